"""Runs that are asked to stop: by a file, by a signal at one rank, at any moment."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_jam.config import signals
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.evaluation import perplexity
from megatron_jam.parallel.world import World
from megatron_jam.training import loop
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import complete_checkpoints
from megatron_jam.training.metrics import Reporter, read_metrics
from megatron_jam.training.step import StepResult
from megatron_jam.training.stop import StopRequested
from tests.helpers.pool import WorkerPool
from tests.helpers.training import (
    HALF,
    LAYOUTS,
    STEPS,
    build_training,
    losses,
    run_training,
    settings,
    tensors,
)


class Asks(Callback):
    """Asks, by the file or by a signal to this process, behind the step before `HALF`, which hears
    it and is the last."""

    def __init__(self, stop: Path | signal.Signals) -> None:
        self._stop = stop

    def step_made(self, step: int, result: StepResult) -> None:
        if step == HALF - 1 and isinstance(self._stop, Path):
            self._stop.touch()
        elif step == HALF - 1:
            os.kill(os.getpid(), self._stop)


def until_stopped(world: World, values: dict[str, Any], stop: Path | signal.Signals) -> str:
    """Run, with the last rank asking; the reason that this rank was told."""
    before = {each: signal.getsignal(each) for each in signals.STOPPING}
    signals.catch_signals()
    asks = [Asks(stop)] if world.rank == world.size - 1 else []
    try:
        with pytest.raises(StopRequested) as raised:
            build_training(world, values, asks).run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        signals._received.clear()
    return str(raised.value)


@pytest.mark.parametrize(
    ("layout", "stop"),
    [("one", "stop"), ("pp2", signal.SIGUSR1), ("dp2", signal.SIGTERM), ("tp2", signal.SIGINT)],
)
def test_a_stopped_run_is_saved_and_goes_on(
    layout: str,
    stop: str | signal.Signals,
    material: tuple[Path, Path],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    parallel, data = LAYOUTS[layout]
    pool.run(run_training, parallel, settings(material, tmp_path / "whole", parallel), data=data)
    output = tmp_path / "stopped"
    values = settings(material, output, parallel)
    by = output / stop if isinstance(stop, str) else stop
    reasons = pool.run(until_stopped, parallel, values, by, data=data)
    assert set(reasons) == {by.name if isinstance(by, signal.Signals) else str(by)}
    assert [p.name for p in complete_checkpoints(output / "checkpoints")] == ["step-00000002"]
    assert (output / "requeue").read_text() == f"stopped at step {HALF} by {reasons[0]}\n"
    assert not (output / "stop").exists()
    pool.run(run_training, parallel, values, data=data)
    assert not (output / "requeue").exists()
    assert losses(output) == losses(tmp_path / "whole")
    assert len(losses(output)) == STEPS
    one, other = tensors(tmp_path / "whole"), tensors(output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def hooked(place: Any, name: str, *, is_after: bool) -> Any:
    """A context in which SIGTERM comes to this process, and to the writers of its checkpoint, as it
    calls `place.name`, or when that is done."""
    plain = getattr(place, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        answer = plain(*args, **kwargs) if is_after else None
        for process in (psutil.Process(), *psutil.Process().children()):
            process.send_signal(signal.SIGTERM)
        return answer if is_after else plain(*args, **kwargs)

    return mock.patch.object(place, name, call)


MOMENTS: dict[str, tuple[Any, str, bool, int]] = {
    "building data": (loop, "build_dataset", False, 0),
    "building the model": (loop, "build_engine", False, 0),
    "loading": (loop.Checkpoints, "load_latest", False, 0),
    "the first step": (loop.GlobalBatches, "__call__", False, 1),
    "writing": (loop.Checkpoints, "save", True, HALF),
    "a waited save": (loop.Checkpoints, "finish", False, HALF),
    "validation": (perplexity, "_rounds", False, HALF),
    "the last validation": (perplexity, "_rounds", False, STEPS),
}
"""What is called, whether the signals come after it, and the step at which the run then stands."""


def stopped_at_each_moment(world: World, values: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Runs of which the last rank is asked in each moment; what it was told and had made. Those
    that had made a step are then started again."""
    found, before = {}, {each: signal.getsignal(each) for each in signals.STOPPING}
    for moment, (place, name, is_after, due) in MOMENTS.items():
        changed = {**values, "output": values["output"] / moment}
        changed["validate_every"] = HALF if moment == "validation" else 0
        changed["async_checkpoints"] = moment != "a waited save"
        signals.catch_signals()
        asked = world.rank == world.size - 1
        try:
            hook = hooked(place, name, is_after=is_after) if asked else nullcontext()
            with hook, pytest.raises(StopRequested) as raised:
                build_training(world, changed).run()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
            signals._received.clear()
        dist.barrier()
        told = (changed["output"] / "requeue").read_text().split()
        found[moment] = (str(raised.value), int(told[3]))
        dist.barrier()
        if due:
            build_training(world, changed).run()
    return found


def test_a_signal_at_any_moment_loses_nothing(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """The run stops there, and at the end is the undisturbed one."""
    parallel, data = LAYOUTS["dp2"]
    pool.run(run_training, parallel, settings(material, tmp_path / "whole", parallel), data=data)
    values = settings(material, tmp_path, parallel, checkpoint_every=HALF)
    for found in pool.run(stopped_at_each_moment, parallel, values, data=data):
        assert found == {moment: ("SIGTERM", due) for moment, (*_, due) in MOMENTS.items()}
    due = tensors(tmp_path / "whole")
    for moment, (*_, done) in MOMENTS.items():
        checkpoints = complete_checkpoints(tmp_path / moment / "checkpoints")
        assert [int(p.name[5:]) for p in checkpoints] == ([HALF, STEPS] if done else []), moment
        assert (tmp_path / moment / "requeue").exists() == (not done)
        if not done:
            continue
        assert losses(tmp_path / moment) == losses(tmp_path / "whole"), moment
        made = tensors(tmp_path / moment)
        assert all(torch.equal(due[name], made[name]) for name in due), moment


def asked_too_late(world: World, values: dict[str, Any]) -> None:
    signals.catch_signals()
    before = {each: signal.getsignal(each) for each in signals.STOPPING}
    try:
        with hooked(Reporter, "validated", is_after=True):
            build_training(world, values).run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        signals._received.clear()


def test_a_run_asked_after_its_last_validation_ends(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """What is reported is not reported again by another start."""
    values = settings(material, tmp_path / "run", ParallelConfig())
    pool.run(asked_too_late, ParallelConfig(), values)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [x["step"] for x in lines if x["kind"] == "validation"] == [STEPS]
    assert (tmp_path / "run/weights/provenance.json").is_file()
    assert not (tmp_path / "run/requeue").exists()


def stopped_while_built(world: World, values: dict[str, Any]) -> None:
    with pytest.raises(StopRequested):
        build_training(world, values)


def test_a_run_that_has_not_begun_stops_too(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "stop").touch()
    pool.run(stopped_while_built, ParallelConfig(), settings(material, output, ParallelConfig()))
    assert [p.name for p in output.iterdir()] == ["requeue"]
