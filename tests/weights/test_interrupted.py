"""What is left of a conversion that is killed, whose disk is full, or whose source changes."""

import dataclasses
import json
import mmap
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.faults import tell_of_cut_files
from megatron_jam.weights.conversion import Conversion
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.hf_export import export_hugging_face
from megatron_jam.weights.metaseq.convert import read_metaseq
from megatron_jam.weights.stream import JOURNAL
from tests.helpers.commands import fails, tool
from tests.helpers.forks import CONTEXT
from tests.helpers.metaseq import save
from tests.helpers.pico import pico_config, pico_folder, pico_source, pico_tensors

CONFIG = pico_config("tower", bias=True, affine_norm=True)
FILE_BYTES = 20_000
"""So that the model takes several files."""


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A checkpoint of metaseq in two parts."""
    tensors = {name: value.half() for name, value in pico_tensors(CONFIG).items()}
    pico_source(tmp_path)
    return save(tmp_path / "in", CONFIG, tensors, parts=2)


def conversion(source: str, before: Callable[[int], None] = lambda _: None) -> Conversion:
    """The conversion of `source`, with a call before each tensor is read: how many were before."""
    read = read_metaseq(source, pico_source(Path(source).parents[1]))
    calls = iter(range(10**6))

    def watched(lazy: Any) -> Any:
        def act() -> torch.Tensor:
            before(next(calls))
            return lazy.read()

        return dataclasses.replace(lazy, read=act, cut=None)

    tensors = {name: watched(lazy) for name, lazy in read.tensors.items()}
    return dataclasses.replace(read, tensors=tensors)


def killed(source: str, output: Path, after: int) -> None:
    """Convert in a process that is killed where it is about to read tensor number `after`."""
    process = CONTEXT.Process(target=_convert, args=(source, output, after))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def _convert(source: str, output: Path, after: int) -> None:
    def before(number: int) -> None:
        if number == after:
            os.kill(os.getpid(), signal.SIGKILL)

    conversion(source, before).write(output, file_bytes=FILE_BYTES)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_conversion_goes_on(source: str, tmp_path: Path) -> None:
    conversion(source).write(tmp_path / "due", file_bytes=FILE_BYTES)
    total = len(WeightsFolder(tmp_path / "due").names)
    output, part = tmp_path / "out", tmp_path / ".out.part"
    begun = 0
    for after in (30, 25):
        killed(source, output, after)
        assert not output.exists()
        journal = json.loads((part / JOURNAL).read_text())
        done = sum(map(len, journal["files"]))
        assert begun < done <= begun + after
        begun = done
        with pytest.raises(UsageError, match="is not a weights folder"):
            WeightsFolder(part)
    reads: list[int] = []
    certificate = conversion(source, reads.append).write(output, file_bytes=FILE_BYTES)
    certified = len(reads) - (total - begun)  # what the certificate read again
    assert 0 < begun < total
    assert certified == 2 * total + 1  # for their numbers and the logits, the tied table twice
    assert certificate["largest_difference"] == 0
    assert files_of(output) == files_of(tmp_path / "due")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "due",
        "in",
        "out",
        "pico_tokenizer",
    ]


def test_what_a_killed_conversion_left_is_not_taken_for_another(
    source: str, tmp_path: Path
) -> None:
    """Neither of another checkpoint, nor a file that is not whole."""
    output, part = tmp_path / "out", tmp_path / ".out.part"
    killed(source, output, 30)
    first = min(part.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    reads: list[int] = []
    conversion(source, reads.append).write(output, file_bytes=FILE_BYTES)
    names = WeightsFolder(output).names
    assert len(reads) == 3 * len(names) + 1
    shutil.rmtree(output)
    killed(source, output, 30)
    path = Path(source).with_name("checkpoint_3-model_part-0.pt")
    os.utime(path, ns=(0, 0))
    reads.clear()
    conversion(source, reads.append).write(output, file_bytes=FILE_BYTES)
    assert len(reads) == 3 * len(names) + 1


def test_an_interruption_keeps_what_is_whole(source: str, tmp_path: Path) -> None:
    def before(number: int) -> None:
        if number == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion(source, before).write(tmp_path / "out", file_bytes=FILE_BYTES)
    assert (tmp_path / ".out.part" / JOURNAL).is_file()
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_is_an_error(source: str, tmp_path: Path) -> None:
    path = Path(source).with_name("checkpoint_3-model_part-1.pt")

    def before(number: int) -> None:
        if number == 30:
            with path.open("r+b") as file:
                file.write(path.read_bytes()[:4])
            os.utime(path)

    with pytest.raises(UsageError, match=r"part-1\.pt was changed while it was read"):
        conversion(source, before).write(tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "pico_tokenizer"]


def test_a_folder_that_changes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = pico_folder(tmp_path / "w", CONFIG, dtype=torch.float32)
    read = WeightsFolder.read

    def touched(self: WeightsFolder, name: str, *rest: Any) -> torch.Tensor:
        if name == "head.norm.weight":
            os.utime(next(weights.glob("*.safetensors")))
        return read(self, name, *rest)

    monkeypatch.setattr(WeightsFolder, "read", touched)
    with pytest.raises(UsageError, match="safetensors was changed while it was read"):
        export_hugging_face(weights, tmp_path / "hf")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pico_tokenizer", "w"]


def _read_cut_file(path: Path, told: Path) -> None:
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    tell_of_cut_files()
    with path.open("r+b") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        file.truncate(5000)
        sum(view[:])


def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path) -> None:
    path, told = tmp_path / "a file", tmp_path / "told"
    path.write_bytes(bytes(100_000))
    process = CONTEXT.Process(target=_read_cut_file, args=(path, told))
    process.start()
    process.join(60)
    assert told.read_text() == f"error: {path} was cut off while it was read: run this again\n"
    assert process.exitcode == 2


def _convert_cut_file(source: str, told: Path) -> None:
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    tell_of_cut_files()

    def before(number: int) -> None:
        if number == 30:
            os.truncate(Path(source).with_name("checkpoint_3-model_part-1.pt"), 5000)

    conversion(source, before).write(Path(source).parents[1] / "out")


def test_a_source_that_is_cut_off_is_one_line(source: str, tmp_path: Path) -> None:
    """Also where the kernel finds out while it writes."""
    told = tmp_path / "told"
    process = CONTEXT.Process(target=_convert_cut_file, args=(source, told))
    process.start()
    process.join(60)
    (line,) = told.read_text().splitlines()
    assert line.endswith(
        "checkpoint_3-model_part-1.pt was cut off while it was read: run this again"
    )
    assert process.exitcode == 2
    assert not (tmp_path / "out").exists()


def _limited(told: Path, target: Callable[..., None], arguments: list[str]) -> None:
    """Run a command where no file may be larger than 100 kB."""
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    run_command(target, arguments)


@pytest.mark.parametrize("name", ["convert_metaseq", "convert_hf", "init", "unfuse", "fuse"])
def test_a_disk_without_room_is_one_line(name: str, source: str, tmp_path: Path) -> None:
    import importlib

    config = pico_config("cross", num_layers=8)
    weights = str(pico_folder(tmp_path / "w", config, dtype=torch.float32))
    tokenizer, output = str(pico_source(tmp_path)), str(tmp_path / "out")
    (tmp_path / "tower.yaml").write_text(
        "towers: {main: {num_layers: 8, hidden_size: 32, num_heads: 4}}\nmax_positions: 64\n"
    )
    (tmp_path / "recipe.yaml").write_text(f"method: cross\noutput: {output}\n")
    arguments = {
        "convert_metaseq": ["--input", source, "--tokenizer", tokenizer, "--output", output],
        "convert_hf": ["export", weights, output],
        "init": [str(tmp_path / "tower.yaml"), tokenizer, output],
        "unfuse": [weights, "image", output],
        "fuse": [str(tmp_path / "recipe.yaml")],
    }[name]
    if name == "fuse":
        for seed, parent in enumerate(("text", "image")):
            pico_folder(tmp_path / parent, pico_config("tower"), seed=seed, dtype=torch.float32)
        with (tmp_path / "recipe.yaml").open("a") as file:
            file.writelines(f"{each}: {tmp_path / each}\n" for each in ("text", "image"))
    told = tmp_path / "told"
    target = importlib.import_module(f"tools.{name}").main
    process = CONTEXT.Process(target=_limited, args=(told, target, arguments))
    process.start()
    process.join(60)
    last = told.read_text().splitlines()[-1]
    assert last.startswith(
        f"error: larger than a file may be here: {tmp_path}/.out.part/model-0"
    ), last
    assert process.exitcode == 2
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.part").exists() == (name == "convert_metaseq")


def test_a_truncated_file_is_one_line(tmp_path: Path) -> None:
    weights = pico_folder(tmp_path / "w", pico_config("cross"), dtype=torch.float32)
    parent = pico_folder(tmp_path / "parent", pico_config("tower"), dtype=torch.float32)
    for folder in (weights, parent):
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-100])
    recipe = {"method": "uniform", "text": "parent", "image": "parent", "output": "out"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    before = sorted(tmp_path.iterdir())
    message = "model-00001-of-00001.safetensors is damaged"
    for name, arguments in {
        "convert_hf": ("export", str(weights), "out"),
        "unfuse": (str(weights), "image", "out"),
        "verify": (str(weights),),
        "fuse": ("recipe.yaml",),
    }.items():
        fails(tool(name, *arguments, cwd=tmp_path), message)
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_journal_is_no_journal(source: str, tmp_path: Path) -> None:
    output = tmp_path / "made"
    killed(source, output, 30)
    (journal,) = tmp_path.glob(f".*/{JOURNAL}")
    journal.write_text("{")
    assert conversion(source).write(output, file_bytes=FILE_BYTES)["largest_difference"] == 0
    assert not list(tmp_path.glob(f".*/{JOURNAL}"))
