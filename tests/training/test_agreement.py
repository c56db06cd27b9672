"""One message of a step tells all ranks of a loss that is not finite on one, and of a request."""

import math
from pathlib import Path

import torch.distributed as dist

from megatron_jam.config.health import HealthConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.agreement import Agreement
from megatron_jam.training.health import Health
from megatron_jam.training.stop import StopPoll, StopRequested
from tests.helpers.pool import WorkerPool


def told(world: World, output: Path, losses: list[float]) -> tuple[str, str]:
    """Why this rank skips a step, and stops behind it, if ranks have `losses`."""
    stop = StopPoll(output, world)
    agreement = Agreement(Health(HealthConfig()), stop)
    messages = agreement.message(losses[world.rank])
    dist.all_reduce(messages)
    skips = agreement(losses[world.rank], 1.0, messages)
    try:
        stop.check()
    except StopRequested as reason:
        return skips, str(reason)
    return skips, ""


def test_all_ranks_skip_and_stop_alike(pool: WorkerPool, tmp_path: Path) -> None:
    run = (told, ParallelConfig(), tmp_path)
    assert pool.run(*run, [2.0, 2.0], data=2) == [("", "")] * 2
    found = pool.run(*run, [2.0, math.nan], data=2)
    assert found == [("the loss of another rank is not finite", ""), ("the loss is nan", "")]
    (tmp_path / "stop").touch()
    found = pool.run(*run, [2.0, 2.0], data=2)
    assert found == [("", str(tmp_path / "stop"))] * 2
    found = pool.run(*run, [math.inf, 2.0], data=2)
    assert [skips for skips, _ in found] == [
        "the loss is inf",
        "the loss of another rank is not finite",
    ]
    assert {stops for _, stops in found} == {str(tmp_path / "stop")}
