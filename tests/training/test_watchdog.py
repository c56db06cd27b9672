"""Runs that make no progress, copies that differ, memory that is planned and measured."""

import ctypes
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.health import HealthConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World
from megatron_jam.training import loop
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.preflight import CopiesDiffer
from megatron_jam.training.step import StepResult
from megatron_jam.training.watchdog import EXIT_HANG, Watchdog
from tests.helpers.pool import WorkerPool
from tests.helpers.training import LAYOUTS, build_training, losses, settings


class Sleeps(Callback):
    """Falls asleep after step 2."""

    def step_made(self, step: int, result: StepResult) -> None:
        if step == 2:
            time.sleep(4)


def late_run(world: World, values: dict[str, Any]) -> tuple[list[int], str]:
    """A run of which the last rank sleeps; the statuses with which its watchdog would have ended
    it, and what this rank said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_jam").addHandler(handler)
    training = build_training(world, values, [Sleeps()] if world.rank == world.size - 1 else [])
    statuses: list[int] = []
    training._watchdog = Watchdog(training.config.output, world, seconds=1.5, leave=statuses.append)
    try:
        training.run()
    finally:
        logging.getLogger("megatron_jam").removeHandler(handler)
    return statuses, "\n".join(said)


def test_the_rank_that_is_late_is_named_with_step_and_place(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Here the run goes on after the report, as nobody was really ended."""
    parallel, data = LAYOUTS["dp2"]
    values = settings(material, tmp_path / "run", parallel)
    (first, said), (second, silent) = pool.run(late_run, parallel, values, data=data)
    assert (first, second) == ([EXIT_HANG], [EXIT_HANG])
    assert "no progress" not in silent
    (line,) = (line for line in said.splitlines() if "no progress" in line)
    assert line.startswith(
        "no progress for 1.5 s; rank 1 is late: it was at forward pass, backward pass and update of"
        " step 2 since "
    )
    assert "is in training/loop.py" in line
    report = (tmp_path / "run/stacks/report.txt").read_text()
    assert "rank 0 was at forward pass, backward pass and update of step 2 since" in report
    assert "waits in all_reduce (training/" in report
    stacks = [(tmp_path / f"run/stacks/rank-0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "all_reduce" in stacks[0]
    assert "test_watchdog.py" in stacks[1]
    assert len(losses(tmp_path / "run")) == 4


def keep_the_lock(world: World, output: Path) -> list[int]:
    """A rank that is stuck in C code with the interpreter's lock; its standard error goes to a
    file."""
    statuses: list[int] = []
    before = os.dup(2)
    with (output / "stderr").open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            with Watchdog(output, world, seconds=0.5, leave=statuses.append) as watchdog:
                watchdog.progress(7, "work")
                time.sleep(0.3)
                ctypes.PyDLL(None).usleep(1_200_000)
                time.sleep(0.5)
        finally:
            os.dup2(before, 2)
            os.close(before)
    return statuses


def test_stacks_of_a_rank_that_keeps_the_interpreters_lock(
    pool: WorkerPool, tmp_path: Path
) -> None:
    assert pool.run(keep_the_lock, ParallelConfig(), tmp_path) == [[EXIT_HANG]]
    said = (tmp_path / "stderr").read_text()
    assert said.startswith("Timeout (0:00:00.5")
    assert "in keep_the_lock" in said
    assert "work of step 7" in (tmp_path / "stacks/report.txt").read_text()


class Flips(Callback):
    """Changes one weight of this rank after step 2, as a faulty memory would."""

    def begins(self, training: loop.Training, first: int) -> None:
        self._weights = list(training.chunks[0].named_parameters())

    def step_made(self, step: int, result: StepResult) -> None:
        if step == 2:
            with torch.no_grad():
                self._weights[3][1].view(-1)[5] += 1e-3


def flipped_run(world: World, values: dict[str, Any]) -> str:
    training = build_training(world, values, [Flips()] if world.rank == 1 else [])
    with pytest.raises(CopiesDiffer) as raised:
        training.run()
    return f"{training._done} {raised.value}"


def test_copies_that_differ_stop_the_run_and_are_not_saved(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel = ParallelConfig()
    values = settings(material, tmp_path / "run", parallel, checkpoint_every=2, global_batch_size=3)
    values["health"] = HealthConfig(compare_replicas_every=2)
    ends = pool.run(flipped_run, parallel, values, data=3)
    assert all("2 after step 2: " in end for end in ends)
    assert "on rank(s) [1] is not what it is on the others of [0, 1, 2]" in ends[0]
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def remembered_run(world: World, values: dict[str, Any]) -> list[str]:
    said: list[str] = []
    logger = logging.getLogger("megatron_jam")
    level, handler = logger.level, logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        build_training(world, values).run()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [line for line in said if line.startswith("memory ")]


def test_memory_is_said_before_and_measured_at_step_2(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, data = LAYOUTS["pp2"]
    values = settings(material, tmp_path / "run", parallel)
    lines, _ = pool.run(remembered_run, parallel, values, data=data)
    assert len(lines) == 2
    assert lines[0].startswith("memory planned: 0.0")
    assert lines[1].startswith("memory measured at step 2: 0.")
