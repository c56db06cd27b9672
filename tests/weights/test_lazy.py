"""Tensors that are read when they are asked for, some rows at a time."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.convert import anonymous_bytes
from megatron_jam.weights import lazy
from megatron_jam.weights.lazy import Lazy, joined, read_as, rows, same
from megatron_jam.weights.metaseq.merge import read_parts
from tests.helpers.metaseq import shard, split


def of(tensor: Tensor, cuts: list[int] | None = None) -> Lazy:
    """A tensor that is not to be read whole; how many bytes were read at once goes to `cuts`."""

    def read() -> Tensor:
        raise AssertionError("read whole")

    def cut(start: int, stop: int) -> Tensor:
        if cuts is not None:
            cuts.append(tensor[start:stop].nbytes)
        return tensor[start:stop]

    return Lazy(shape=tuple(tensor.shape), dtype=tensor.dtype, read=read, cut=cut)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_parts_are_copied_block_by_block(
    dim: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", block)
    whole = torch.arange(12.0 * 9).view(12, 9)
    cuts: list[int] = []
    made = joined([of(part, cuts) for part in whole.tensor_split(3, dim=dim)], dim)
    assert made.shape == (12, 9)
    assert torch.equal(made.read(), whole)
    row = 4 * (9 if dim == 0 else 3)
    assert max(cuts) <= max(row, block)
    for start, stop in ((0, 12), (3, 7), (5, 5), (11, 12)):
        assert torch.equal(rows(made, start, stop).read(), whole[start:stop])
        assert torch.equal(rows(rows(made, 1, 12), 2, 5).read(), whole[3:6])


def test_large_ones_are_compared_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 40)
    one, cuts = torch.arange(50.0).view(10, 5), list[int]()
    assert same(of(one, cuts), of(one.clone()))
    assert max(cuts) == 40
    other = one.clone()
    other[9, 4] = 0
    assert not same(of(one), of(other))
    assert not same(of(one), of(one[:9]))


def test_another_dtype_is_made_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 40)
    whole, cuts = torch.arange(50.0).view(10, 5).half(), list[int]()
    made = read_as(of(whole, cuts), torch.float32)
    assert made.dtype == torch.float32
    assert torch.equal(made, whole.float())
    assert max(cuts) == 40
    mapped = Lazy(shape=(10, 5), dtype=whole.dtype, read=lambda: whole)
    assert torch.equal(read_as(mapped, torch.float32), made)


def peak(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `run` returns, and by how many bytes anonymous memory grew at most meanwhile."""
    before, found, ended = anonymous_bytes(os.getpid()), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            found.append(anonymous_bytes(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return run(), max(found) - before
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("key", ["embed_tokens.weight", "layers.0.fc2.weight", "q_proj.weight"])
def test_a_tensor_of_parts_and_shards_is_in_memory_once(key: str, tmp_path: Path) -> None:
    room = "decoder." if key.startswith(("embed", "layers")) else "decoder.layers.0.self_attn."
    shape = (2048, 16384) if "fc2" in key else (16384, 2048)
    tensors = {f"{room}{key}": torch.randn(shape).half()}
    if key.startswith("q_"):
        tensors |= {f"{room}{letter}_proj.weight": torch.ones(shape).half() for letter in "kv"}
    files = []
    for number, part in enumerate(split(tensors, 4)):
        files.append([tmp_path / f"{number}-{rank}.pt" for rank in range(3)])
        shared = {"decoder.embed_tokens.weight": torch.ones(1).half(), **part}
        for path, values in zip(files[-1], shard(shared, 3), strict=True):
            torch.save(values, path)
    _, wholes = read_parts(files)
    (whole,) = (each.tensor for each in wholes if each.key == f"{room}{key}")
    made, grown = peak(whole.read)
    assert torch.equal(made, tensors[f"{room}{key}"])
    assert grown < 1.3 * made.nbytes
