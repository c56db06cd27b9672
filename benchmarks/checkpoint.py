"""Checkpoints and a step's checks: the stall of a save, speed over `cp`, what a step pays for being
watched; one thread a rank. `torchrun --nproc_per_node 2 -m benchmarks.checkpoint` has two replicas.
"""

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

from benchmarks.models import tower_config
from benchmarks.timing import Row, row, seconds, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.model import TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import RunConfig, load_run_config
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.versions import OWN_WRITERS
from megatron_jam.parallel.world import World, start_world, stop_world
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import Checkpoints, Keep
from megatron_jam.training.engine import MegatronEngine
from megatron_jam.training.loop import Training
from megatron_jam.training.step import StepResult
from megatron_jam.weights.folder import WeightsFolder
from tools.drilled_run import make_material

VOCABULARY = 16_384
TOWER = TowerConfig(num_layers=4, hidden_size=512, num_heads=8)
STEPS_OF_A_PAIR = 20
NEVER = 1_000_000


def main(
    *,
    pairs: int = 5,
    folder: Path = Path(tempfile.gettempdir()),
    only: Literal["all", "saves", "checks"] = "all",
    json: bool = False,
) -> None:
    """Print ratios; the checkpoint is of a tower of 512 x 4 layers, fp32, with Adam's moments.

    Args:
        pairs: how often each is run.
        only: what is measured: saves and loads, or a step's logging and checks.
        folder: where to write; a file system that matters.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    torch.set_num_threads(1)
    world = start_world(ParallelConfig())
    name = [tempfile.mkdtemp(dir=folder)]
    dist.broadcast_object_list(name)
    root = Path(name[0])
    try:
        config = small_run(world, root)
        rows = {"saves": partial(saves, root=root), "checks": checks}
        for kind, measure in rows.items():
            if only in ("all", kind):
                for each in measure(config, world, pairs=pairs):
                    if world.rank == 0:
                        each.print(as_json=json)
    finally:
        if world.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
    dist.barrier()
    stop_world()


class Saves:
    """What is timed: our saves, Megatron's, and a copy of the files."""

    def __init__(self, config: RunConfig, world: World, root: Path) -> None:
        large = tower_config(TOWER, vocabulary=VOCABULARY, length=512)
        ids = {"text_size": VOCABULARY - 20, "num_image_codes": 2, "num_sentinels": 16}
        model = JamModel(large, world, dtype=torch.float32)
        engine = MegatronEngine([model], config, world, JointVocabulary.build(**ids))
        self._engine = engine
        self._world, self._root, self._steps = world, root, itertools.count(1)
        self.ours = Checkpoints(root / "ours", engine, world, identity={}, keep=Keep(newest=1))

    def newest(self) -> Path:
        """The checkpoint that is there."""
        (path,) = (self._root / "ours").glob("step-*")
        return path

    def begin(self) -> None:
        """What training waits for."""
        self.ours.save(next(self._steps), {})

    def stall(self) -> float:
        """Seconds that a save keeps training of steps of a quarter of a second."""
        waited, path = seconds(self.begin), None
        while path is None:
            time.sleep(0.25)
            start = time.perf_counter()
            path = self.ours.poll()
            waited += time.perf_counter() - start
        return waited

    def whole(self) -> None:
        """Until the checkpoint is committed."""
        self.begin()
        self.ours.finish()

    def plain(self) -> None:
        """Megatron's, which waits, and writes no checksums."""
        dist_checkpointing.save(self._megatrons_state(), str(self._fresh("plain")))

    def plain_stall(self) -> float:
        """Seconds until Megatron's writer, a fork, has been started."""
        path = self._fresh("plain")
        start = time.perf_counter()
        state = self._megatrons_state()
        request = dist_checkpointing.save(state, str(path), async_sharded_save=True, **OWN_WRITERS)
        writer = TemporalAsyncCaller()
        writer.schedule_async_call(request)
        waited = time.perf_counter() - start
        writer.is_current_async_call_done(blocking=True, no_dist=False)
        start = time.perf_counter()
        for finalize in request.finalize_fns:
            finalize()
        return waited + time.perf_counter() - start

    def _megatrons_state(self) -> dict[str, Any]:
        model = self._engine.sharded_state(is_loading=False)["model"]
        kind = {"distrib_optim_sharding_type": "fully_reshardable"}
        state = self._engine.optimizer.sharded_state_dict(model, is_loading=False, metadata=kind)
        return {"model": model, "optimizer": state}

    def copy(self) -> None:
        """The files' bytes, to the same file system."""
        path = self._fresh("copy")
        if self._world.rank == 0:
            for each in self.newest().glob("*.*"):
                if each.is_file():
                    shutil.copyfile(each, path / each.name)
                    _sync(path / each.name)
        dist.barrier()

    def _fresh(self, name: str) -> Path:
        path = self._root / name
        if self._world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        dist.barrier()
        return path


def saves(config: RunConfig, world: World, root: Path, pairs: int) -> Iterator[Row]:
    """Stall, save and load."""
    timed = Saves(config, world, root)
    trials = [(timed.stall(), seconds(timed.whole), timed.plain_stall()) for _ in range(pairs + 2)][
        2:
    ]
    over = [whole / stall for stall, whole, _ in trials]
    files = [each for each in timed.newest().rglob("*") if each.is_file()]
    size = f"{sum(each.stat().st_size for each in files) / 1e6:.0f} MB"
    compared = {
        "speed of a waited save over Megatron's own": (
            timed.whole,
            timed.plain,
        ),
        "speed of a waited save over cp and fsync": (timed.whole, timed.copy),
        "speed of checking and loading over cp and fsync": (timed.ours.load_latest, timed.copy),
    }
    yield row(f"{size}: time of a waited save over an asynchronous one's stall", over)
    yield row("seconds of the stall", [stall for stall, *_ in trials])
    yield row("stall of Megatron's own asynchronous save over ours", [p / s for s, _, p in trials])
    for name, runs in compared.items():
        yield speed_over(name, *runs, pairs=pairs)
    yield row("seconds of checking and loading", [seconds(timed.ours.load_latest) for _ in over])


def small_run(world: World, root: Path) -> RunConfig:
    """A run of a model whose steps are short, with a log line each."""
    if world.rank == 0:
        make_material(root)
    dist.barrier()
    changes = {"config": root / "run.yaml", "output": root / "run"}
    changes |= {"steps": 100_000, "checkpoint_every": 0, "validate_every": 0, "dropout": 0}
    return load_run_config([f"--{name}={value}" for name, value in changes.items()])


class LastStep(Callback):
    """Remembers what of the last step is not measured."""

    seconds = 0.0

    def step_made(self, step: int, result: StepResult) -> None:
        """Its parts, the batch included, and the wait for ranks that are slower at them, which
        would else be had by the next step."""
        self.seconds = sum(result.seconds.values()) + seconds(dist.barrier)


def checks(config: RunConfig, world: World, pairs: int) -> list[Row]:
    """What a step takes beyond its batch, its passes and its update, medians of a few steps: the
    rest of the loop, judging the step, and what norms by part take longer than Megatron's norm.

    Not the difference of whole steps with and without, which vary by more than all of this.
    """
    name = f"milliseconds of logging and checks a step, {world.size} rank(s), "
    cases = {"with a line": 1, "without one": NEVER}
    return [row(name + case, _beyond(config, world, pairs, each)) for case, each in cases.items()]


def _beyond(config: RunConfig, world: World, pairs: int, log_every: int) -> list[float]:
    last, config = LastStep(), replace(config, log_every=log_every)
    training = Training(config, WeightsFolder(config.weights), world, lambda *_: {}, [last])
    training._prepare()
    engine, steps = training.engine, itertools.count()
    assert isinstance(engine, MegatronEngine)

    def judged() -> None:
        """As in a step: norms by part, with what the ranks tell one another."""
        messages = training._agreement.message(1.0)
        engine._part_norms(messages)
        training._agreement(1.0, 1.0, messages)

    def beyond() -> float:
        taken = seconds(lambda: training._advance(next(steps))) - last.seconds
        dist.barrier()
        own = seconds(judged) - seconds(engine.optimizer.get_grad_norm)
        return 1e3 * (taken + own)

    return [median(beyond() for _ in range(STEPS_OF_A_PAIR)) for _ in range(pairs + 1)][1:]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    run_command(main)
