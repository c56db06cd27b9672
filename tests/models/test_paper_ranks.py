"""Any of 256 ranks of the paper's models, built without memory: their shares make the whole."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_jam.config.model import BridgeConfig, ModelConfig, TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.sharding import holders, span
from megatron_jam.parallel.world import World, build_world, stop_world

LAYOUT = ParallelConfig(tensor=8, pipeline=4, sequence=True)
RANKS, REPLICAS = 256, 8
TOWER = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32}
WIDE = {"num_layers": 32, "hidden_size": 8192, "num_heads": 64}
PAIR = {"image": TOWER, "text": TOWER}
MODELS = {
    "tower": ({"main": TOWER}, 0, 6_729_801_728),
    "width": ({"main": WIDE}, 0, 26_344_505_344),
    "cross, no bridges": (PAIR, 0, 13_205_807_104),
    "cross, every layer": (PAIR, 1, 26_090_708_992),
    "cross, every 2": (PAIR, 2, 19_648_258_048),
    "cross, every 4": (PAIR, 4, 16_427_032_576),
}


def ranks_of_one_replica() -> Iterator[World]:
    """The worlds that its 32 ranks see, one after the other, on torch's fake process group."""
    for stage in range(LAYOUT.pipeline):
        for place in range(LAYOUT.tensor):
            rank = place + LAYOUT.tensor * REPLICAS * stage
            dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
            try:
                world = build_world(LAYOUT, torch.device("cpu"))
                assert (world.tensor.rank, world.pipeline.rank) == (place, stage)
                yield dataclasses.replace(world, device=torch.device("meta"))
            finally:
                stop_world()


def local_size(model: JamModel, world: World) -> int:
    """Weights that this rank is the first to hold, without padding."""
    total = 0
    for holder in holders(model):
        assert holder.parameter.is_meta
        for part in () if holder.is_copy else holder.parts:
            size = math.prod(part.shape)
            if part.split is not None:
                start, stop, _ = span(part, world.tensor)
                total += size // part.shape[part.split] * (stop - start)
            elif world.tensor.is_first:
                total += size
    return total


@pytest.mark.parametrize("name", MODELS)
def test_one_replica_holds_the_exact_count(name: str) -> None:
    towers, every, count = MODELS[name]
    config = ModelConfig(
        towers={name: TowerConfig(**settings) for name, settings in towers.items()},
        vocab_size=66_056,
        max_positions=4_096,
        bridges=BridgeConfig(every=every),
    )
    sizes = []
    for world in ranks_of_one_replica():
        model = JamModel(config, world, dtype=torch.bfloat16)
        sizes.append(local_size(model, world))
    assert len(sizes) == LAYOUT.tensor * LAYOUT.pipeline
    assert sum(sizes) == count
