"""Ranks of a large run without the run: their worlds, one after the other, and no memory."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World, build_world, stop_world


def ranks_of_one_replica(parallel: ParallelConfig, ranks: int) -> Iterator[World]:
    """What the ranks of the first replica among `ranks` see, stage by stage, on the meta device and
    torch's fake process group."""
    replicas = parallel.data(ranks)
    for stage in range(parallel.pipeline):
        for place in range(parallel.tensor):
            rank = place + parallel.tensor * replicas * stage
            dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
            try:
                world = build_world(parallel, torch.device("cpu"))
                assert (world.tensor.rank, world.pipeline.rank) == (place, stage)
                yield dataclasses.replace(world, device=torch.device("meta"))
            finally:
                stop_world()
