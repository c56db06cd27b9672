"""Tensors written whole, as blocks of rows, and copied as they lie: the same files."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.weights.stream import INDEX, Fill, TensorStream
from megatron_jam.weights.tensor_file import Stored, read_header

ROWS = 70_000
"""More than one piece of 2 MiB."""


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (ROWS, 33), "b": (5,), "c": (3, 4)}
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}


def stream(folder: Path, given: dict[str, Tensor]) -> TensorStream:
    folder.mkdir()
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    return TensorStream(folder, shapes, torch.bfloat16, file_bytes=4_000_000)


def fill(tensor: Tensor) -> Fill:
    return lambda out, start, stop: out.copy_(tensor[start:stop])  # type: ignore[return-value]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_blocks_and_copies_make_the_same_files(tmp_path: Path) -> None:
    given = tensors()
    whole = stream(tmp_path / "whole", given)
    for name, tensor in given.items():
        whole.write(name, tensor)
    whole.finish()
    digest = hashlib.sha256(given["a"].view(torch.uint8).numpy().tobytes()).hexdigest()
    assert whole.hashes["a"] == digest
    assert len(files(tmp_path / "whole")) == 3
    assert INDEX in files(tmp_path / "whole")

    parts = stream(tmp_path / "parts", given)
    source = tmp_path / "whole" / "model-00002-of-00002.safetensors"
    parts.write_together({"a": fill(given["a"])})
    for name in ("b", "c"):
        start, stop = read_header(source)[name]
        hashed = whole.hashes[name]
        parts.copy(name, Stored(path=source, offset=start, size=stop - start, sha256=hashed))
    parts.finish()
    assert parts.hashes == whole.hashes
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    with safe_open(str(source), framework="pt") as opened:
        assert torch.equal(opened.get_tensor("c"), given["c"])


@pytest.mark.parametrize("rows", [40_000, 70_001])
def test_many_side_by_side_and_in_any_order(rows: int, tmp_path: Path) -> None:
    """Of several files, in several pieces, whose rows are no multiple of a hash's block."""
    generator = torch.Generator().manual_seed(0)
    given = {str(n): torch.randn(rows, 33, generator=generator).bfloat16() for n in range(9)}
    whole = stream(tmp_path / "whole", given)
    for name, tensor in given.items():
        whole.write(name, tensor)
    whole.finish()
    parts = stream(tmp_path / "parts", given)
    last = given.pop("8")
    parts.write_together({"8": fill(last)})
    parts.write_together({name: fill(tensor) for name, tensor in reversed(given.items())})
    parts.finish()
    assert parts.hashes == whole.hashes
    assert len(files(tmp_path / "whole")) > 5
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_unlike_shapes_together(tmp_path: Path) -> None:
    """More tensors than lanes, of several sizes, ranks and files; one of no rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(70_000, 33), *[(9000 + 7 * n, 40) for n in range(30)], *[(n,) for n in range(9)]]
    given = {
        str(n): torch.randn(shape, generator=generator).bfloat16() for n, shape in enumerate(shapes)
    }
    whole, parts = stream(tmp_path / "whole", given), stream(tmp_path / "parts", given)
    for name, tensor in given.items():
        whole.write(name, tensor)
    whole.finish()
    parts.write_together({name: fill(tensor) for name, tensor in given.items()})
    parts.finish()
    assert parts.hashes == whole.hashes
    assert len(files(tmp_path / "whole")) > 5
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_source_that_ends_early_is_an_error(tmp_path: Path) -> None:
    given = {"b": tensors()["b"]}
    (tmp_path / "short").write_bytes(b"12345678")
    parts = stream(tmp_path / "parts", given)
    with pytest.raises(UsageError, match="short was cut off while it was read"):
        parts.copy("b", Stored(path=tmp_path / "short", offset=2, size=10, sha256=""))
