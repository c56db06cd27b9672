"""Runs that are asked to stop: by a file, by a signal at one rank, at any moment."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config import signals
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import RunConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import complete_checkpoints
from megatron_jam.training.loop import Training
from megatron_jam.training.losses import Losses
from megatron_jam.training.step import StepResult
from megatron_jam.training.stop import StopRequested
from megatron_jam.weights.folder import WeightsFolder
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
    """Asks to stop after `HALF` steps: by the file, or by a signal to this process."""

    def __init__(self, stop: Path | signal.Signals) -> None:
        self._stop = stop

    def step_made(self, step: int, result: StepResult) -> None:
        if step == HALF and isinstance(self._stop, Path):
            self._stop.touch()
        elif step == HALF:
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


def stopped_in_validation(world: World, values: dict[str, Any]) -> tuple[int, str]:
    """Run with a validation that would never end, and in which the stop file appears."""
    config = RunConfig(**values)
    seen = []

    def validate(_: Any, poll: Any) -> Mapping[str, Losses]:
        while True:
            seen.append(len(seen))
            if len(seen) == 3:
                (config.output / "stop").touch()
            poll()

    training = Training(config, WeightsFolder(config.weights), world, validate)
    with pytest.raises(StopRequested) as raised:
        training.run()
    return len(seen), str(raised.value)


def test_a_validation_is_left_when_asked(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    values = settings(material, tmp_path / "run", ParallelConfig(), validate_every=HALF)
    (found,) = pool.run(stopped_in_validation, ParallelConfig(), values)
    assert found == (3, str(tmp_path / "run/stop"))
    assert [p.name for p in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]


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
