"""Checkpoints and a step's checks: the stall of a save, speed over `cp`, what a step pays for being
watched; one thread a rank. `torchrun --nproc_per_node 2 -m benchmarks.checkpoint` has two replicas.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from benchmarks.models import RATE, tower_config
from benchmarks.timing import Row, Run, row, seconds, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.model import TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig, load_run_config
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.world import World, start_world, stop_world
from megatron_jam.training.checkpoint import Checkpoints, Keep
from megatron_jam.training.loop import Training
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.state import sharded_state
from megatron_jam.training.step import train_step
from megatron_jam.weights.folder import WeightsFolder
from tools.drilled_run import make_material

TOWER = TowerConfig(num_layers=4, hidden_size=512, num_heads=8)
STEPS_OF_A_PAIR = 20


def main(*, pairs: int = 5, folder: Path = Path(tempfile.gettempdir()), json: bool = False) -> None:
    """Print ratios; the checkpoint is of a tower of 512 x 4 layers, fp32, with Adam's moments.

    Args:
        pairs: how often each is run.
        folder: where to write; a file system that matters.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    torch.set_num_threads(1)
    world = start_world(ParallelConfig())
    name = [tempfile.mkdtemp(dir=folder)]
    dist.broadcast_object_list(name)
    root = Path(name[0])
    try:
        rows = [*saves(world, root, pairs), checks(world, root, pairs)]
    finally:
        dist.barrier()
        if world.rank == 0:
            shutil.rmtree(root)
    stop_world()
    for each in rows if world.rank == 0 else ():
        each.print(as_json=json)


def saves(world: World, root: Path, pairs: int) -> list[Row]:
    """Stall, save and load."""
    model = JamModel(tower_config(TOWER, vocabulary=16_384, length=512), world, dtype=torch.float32)
    optimizer = build_optimizer(wrap_chunks([model], world), OptimizerConfig())
    settings = {"identity": {}, "keep": Keep(newest=1)}
    ours = Checkpoints(root / "ours", [model], optimizer, world, **settings)
    steps = iter(range(1, 10_000))

    def begin() -> None:
        ours.save(next(steps), {})

    def whole() -> None:
        begin()
        ours.finish()

    def plain() -> None:
        path = root / "plain"
        if world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        dist.barrier()
        state = sharded_state([model], optimizer, world, is_loading=False)
        dist_checkpointing.save(state, str(path))

    def copy() -> None:
        if world.rank == 0:
            (newest,) = (root / "ours").glob("step-*")
            shutil.rmtree(root / "copy", ignore_errors=True)
            shutil.copytree(newest, root / "copy")
            for each in (root / "copy").rglob("*"):
                _sync(each)
        dist.barrier()

    stalls, after = [], []
    for _ in range(pairs + 1):
        stall = seconds(begin)
        ours.finish()
        stalls.append(seconds(whole) / stall)
        after.append(stall)
    (newest,) = (root / "ours").glob("step-*")
    size = sum(each.stat().st_size for each in newest.rglob("*") if each.is_file())
    replicas = world.replicas.size
    return [
        row(
            f"time of a waited save over an asynchronous one's stall, {size / 1e6:.0f} MB,"
            f" {replicas} replica(s)",
            stalls[1:],
        ),
        row("seconds of the stall itself", after[1:]),
        speed_over(
            "speed of a waited save over Megatron's dist_checkpointing.save",
            whole,
            plain,
            pairs=pairs,
        ),
        speed_over("speed of a waited save over cp and fsync", whole, copy, pairs=pairs),
        speed_over(
            "speed of checking and loading over cp and fsync",
            ours.load_latest,
            copy,
            pairs=pairs,
        ),
    ]


def checks(world: World, root: Path, pairs: int) -> Row:
    """What a step takes beyond its computation: batch-wise alternation of a run's whole step, with
    a log line each, and the computation alone."""
    if world.rank == 0:
        make_material(root)
    dist.barrier()
    changes = {"steps": 100_000, "checkpoint_every": 0, "validate_every": 0, "dropout": 0}
    changes |= {"config": root / "run.yaml", "output": root / "run", "log_every": 1}
    config = load_run_config([f"--{name}={value}" for name, value in changes.items()])
    training = Training(config, WeightsFolder(config.weights), world, lambda *_: {})
    training._prepare()
    steps = iter(range(100_000))

    def watched() -> None:
        for _ in range(STEPS_OF_A_PAIR):
            training._advance(next(steps))

    def bare() -> None:
        for _ in range(STEPS_OF_A_PAIR):
            batches = training._batches(next(steps))
            train_step(training._step, training._optimizer, batches, RATE)

    found = []
    for number in range(pairs + 2):
        order: list[Run] = [watched, bare] if number % 2 else [bare, watched]
        times = {run: seconds(run) for run in order}
        found.append((times[watched] - times[bare]) / STEPS_OF_A_PAIR * 1e3)
    return row(f"milliseconds of logging and checks a step, {world.size} rank(s)", found[2:])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


if __name__ == "__main__":
    run_command(main)
