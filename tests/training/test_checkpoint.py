"""Checkpoints: written in the background, whole or not there, kept and dropped, damage named."""

import itertools
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.loader import build_dataset
from megatron_jam.parallel.world import World
from megatron_jam.training import staging
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import SaveFailed, complete_checkpoints, mark_best
from megatron_jam.training.loop import Training
from megatron_jam.training.manifest import find_damage, read_manifest
from megatron_jam.training.metrics import read_metrics
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pool import WorkerPool
from tests.helpers.training import (
    LAYOUTS,
    STEPS,
    build_training,
    losses,
    run_training,
    settings,
    tensors,
)

ONE = ParallelConfig()


def held(training: Training) -> list[torch.Tensor]:
    """Weights and moments of this rank, live."""
    (optimizer,) = training.engine.optimizer.chained_optimizers
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    masters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    return [
        *(p.data for p in training.chunks[0].parameters()),
        *(p.data for p in masters),
        *moments,
    ]


def changed_after_save(world: World, values: dict[str, Any]) -> float:
    """Save, change all that was saved at once, read it back; the largest difference."""
    training = build_training(world, values)
    training.run()
    expected = [value.clone() for value in held(training)]
    training.checkpoints.save(9, {"number": 0.1})
    for value in held(training):
        value.add_(1.0)
    assert training.checkpoints._pending is not None
    path = training.checkpoints.finish()
    assert path is not None
    assert path.name == "step-00000009"
    resumed = training.checkpoints.load_latest()
    assert (resumed.step, resumed.counters) == (9, {"number": 0.1})
    pairs = zip(expected, held(training), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2-pp2"])
def test_what_changes_after_save_returns_is_not_saved(
    layout: str, material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, data = LAYOUTS[layout]
    values = settings(material, tmp_path / "run", parallel, stop_at=1)
    assert pool.run(changed_after_save, parallel, values, data=data) == [0.0] * (
        parallel.tensor * parallel.pipeline * data
    )


class Notes(Callback):
    """At which step each checkpoint was told to be whole."""

    def __init__(self) -> None:
        self.step, self.saved_at = 0, {}

    def step_made(self, step: int, result: object) -> None:
        self.step = step

    def saved(self, step: int, path: Path) -> None:
        assert path.is_dir()
        self.saved_at[step] = self.step


def noted_run(world: World, values: dict[str, Any]) -> dict[int, int]:
    notes = Notes()
    build_training(world, values, [notes]).run()
    return notes.saved_at


def test_training_goes_on_while_a_checkpoint_is_written(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """The same run with and without waiting; every save is told of, at the latest with the next."""
    parallel, data = LAYOUTS["dp2"]
    for kind in (True, False):
        values = settings(material, tmp_path / str(kind), parallel, async_checkpoints=kind)
        values |= {"checkpoint_every": 2, "steps": 6, "keep_checkpoints": 3}
        notes = pool.run(noted_run, parallel, values, data=data)
        assert notes[0] == notes[1]
        assert list(notes[0]) == [2, 4, 6]
        assert all(step <= at <= step + 2 * kind for step, at in notes[0].items())
        if not kind:
            assert notes[0] == {2: 2, 4: 4, 6: 6}
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_which_checkpoints_stay(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    folder = tmp_path / "run/checkpoints"
    mark_best(folder, 1)
    values = settings(material, tmp_path / "run", ONE, checkpoint_every=1, steps=8)
    pool.run(run_training, ONE, {**values, "keep_every": 3, "keep_checkpoints": 2})
    kept = [int(path.name[5:]) for path in complete_checkpoints(folder)]
    assert kept == [1, 3, 6, 7, 8]
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("step-")) == ["best"]


def test_each_epoch_leaves_a_checkpoint(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Besides the newest one, and was measured with what it holds."""
    values = settings(material, tmp_path / "run", ONE, steps=20, keep_epochs=True)
    values |= {"global_batch_size": 4, "keep_checkpoints": 1}
    pool.run(run_training, ONE, values)
    kept = [int(path.name[5:]) for path in complete_checkpoints(tmp_path / "run/checkpoints")]
    vocabulary = WeightsFolder(material[0]).vocabulary
    dataset = build_dataset(values["data"], vocabulary, context_length=32, seed=0)
    ends = [math.ceil(dataset.epoch_size * n / 4) for n in (1, 2)]
    assert ends[0] > 5
    assert kept == sorted({*(end for end in ends if end <= 20), 20})
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [each["step"] for each in lines if each["kind"] == "validation"] == kept


@pytest.fixture(scope="module")
def saved(material: tuple[Path, Path], pool: WorkerPool, tmp_path_factory: Any) -> Path:
    """Output of a whole run with its checkpoints after 2 and 4 steps."""
    output = tmp_path_factory.mktemp("saved") / "run"
    pool.run(run_training, ONE, settings(material, output, ONE, checkpoint_every=2))
    return output


def truncate(path: Path) -> str:
    (file, *_) = sorted(path.glob("*.distcp"))
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 1)
    return f"{file.name} has {size - 1} bytes of {size}"


def flip(path: Path) -> str:
    (*_, file) = sorted(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file.name} has other bytes than were written"


def miss(path: Path) -> str:
    (path / ".metadata").unlink()
    return ".metadata is missing"


def halve(path: Path) -> str:
    (path / "jam.json").unlink()
    return "jam.json is missing: the folder is half a checkpoint"


def swap(path: Path) -> str:
    shutil.copy(path.with_name("step-00000002") / "jam.json", path / "jam.json")
    return "has other bytes than were written"


def edit(path: Path) -> str:
    text = (path / "jam.json").read_text().replace('"step": 4', '"step": 3')
    (path / "jam.json").write_text(text)
    return "jam.json is damaged: its own checksum does not fit"


def cut(path: Path) -> str:
    text = (path / "jam.json").read_text()
    (path / "jam.json").write_text(text[: len(text) // 2])
    return "jam.json is damaged"


def add(path: Path) -> str:
    (path / "__9_9.distcp").write_text("a stranger")
    return "__9_9.distcp is not in the manifest"


def rename(path: Path) -> str:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-00000002"), path)
    return "step-00000004 holds the checkpoint of step 2"


@pytest.mark.parametrize("spoil", [truncate, flip, miss, halve, swap, edit, cut, add, rename])
def test_damage_is_found_and_named(
    spoil: Callable[[Path], str], saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved / "checkpoints", folder)
    newest = folder / "step-00000004"
    assert find_damage(newest) == []
    expected = spoil(newest)
    found = find_damage(newest)
    assert expected in " ".join(found)
    assert spoil is swap or len(found) == 1
    assert find_damage(folder / "step-00000002") == []


def test_a_damaged_checkpoint_stops_the_run_or_the_one_before_is_taken(
    saved: Path, material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, data = LAYOUTS["dp2"]
    output = tmp_path / "run"
    shutil.copytree(saved, output)
    flip(output / "checkpoints/step-00000004")
    part = output / "checkpoints/.step-00000006.0123abcd.part"
    part.mkdir()  # of a save that a kill ended
    values = settings(material, output, parallel)
    with pytest.raises(RuntimeError, match=r"on_damage previous` goes on from .*-00000002, the"):
        pool.run(run_training, parallel, values, data=data)
    pool.run(run_training, parallel, {**values, "on_damage": "previous"}, data=data)
    names = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    assert names == ["step-00000002", "step-00000004", "step-00000004.damaged"]
    assert not part.exists()
    assert losses(output) == pytest.approx(losses(saved), rel=1e-5)
    # With all of them damaged the run would begin anew.
    for name in names[:2]:
        truncate(output / "checkpoints" / name)
    with pytest.raises(RuntimeError, match="on_damage previous` begins anew"):
        pool.run(run_training, parallel, values, data=data)


def run_on_a_full_disk(world: World, values: dict[str, Any], full: list[bool]) -> str:
    """A run whose k-th save finds a disk with 1 MB free where `full` says so, and so do all behind
    the last that it tells of; how it ended."""
    plain, answers = shutil.disk_usage, itertools.chain(full, itertools.repeat(full[-1]))

    def usage(path: Path) -> Any:
        return SimpleNamespace(free=1 << 20) if next(answers) else plain(path)

    with mock.patch.object(staging.shutil, "disk_usage", usage):
        try:
            build_training(world, values).run()
        except SaveFailed as error:
            return str(error)
    return "finished"


def test_a_full_disk_is_told_of_and_the_run_goes_on_until_it_must_save(
    saved: Path, material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, data = LAYOUTS["dp2"]
    values = settings(material, tmp_path / "passing", parallel, checkpoint_every=1)
    ends = pool.run(run_on_a_full_disk, parallel, values, [False, True, True, False], data=data)
    assert ends == ["finished"] * 2
    assert [p.name[-1] for p in complete_checkpoints(tmp_path / "passing/checkpoints")] == [
        "1",
        "4",
    ]
    assert losses(tmp_path / "passing") == pytest.approx(losses(saved), rel=1e-5)
    values["output"] = tmp_path / "last"
    ends = pool.run(run_on_a_full_disk, parallel, values, [False, False, False, True], data=data)
    assert "step 4 was not saved" in ends[0]
    assert "0.00 GB are free" in ends[0]
    assert len(complete_checkpoints(tmp_path / "last/checkpoints")) == 2
    values["output"] = tmp_path / "thrice"
    ends = pool.run(run_on_a_full_disk, parallel, values, [True] * 3, data=data)
    assert "step 3 was not saved" in ends[1]


def run_into_a_limit(world: World, values: dict[str, Any]) -> str:
    """A run whose writers cannot write files of more than 64 KB; how it ended."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with mock.patch.object(staging, "_RESERVE_BYTES", 0):
            build_training(world, values).run()
    except UsageError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "finished"


def test_writers_that_fail_leave_nothing_behind(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, data = LAYOUTS["dp2"]
    values = settings(material, tmp_path / "run", parallel)
    ends = pool.run(run_into_a_limit, parallel, values, data=data)
    assert f"step {STEPS} was not saved: rank 0: Worker failure: " in ends[0]
    assert ends[1] == f"step {STEPS} was not saved: a rank could not write"
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_checkpoint_says_what_it_is_of(saved: Path) -> None:
    path = saved / "checkpoints/step-00000004"
    manifest = read_manifest(path)
    assert manifest["step"] == STEPS
    assert {"run.yaml", "model/config.json", "model/vocabulary.json", ".metadata"} <= set(
        manifest["files"]
    )
    assert (path / "run.yaml").read_text() == (saved / "run.yaml").read_text()
    assert tensors(saved)
