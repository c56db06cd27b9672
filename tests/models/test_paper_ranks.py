"""Any of 256 ranks of the paper's models, built without memory: their shares make the whole."""

import pytest
import torch

from megatron_jam.config.files import read_settings
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.sharding import holders, span
from megatron_jam.parallel.world import World
from tests.examples.test_configs import CONFIGS, COUNTS
from tests.helpers.fake import ranks_of_one_replica

LAYOUT = ParallelConfig(tensor=8, pipeline=4, sequence=True)
RANKS = 256


def local_size(model: JamModel, world: World) -> int:
    """Weights that this rank is the first to hold, by their parameters, without padding."""
    total = 0
    for holder in holders(model):
        assert holder.parameter.is_meta
        if holder.is_copy or (holder.split is None and not world.tensor.is_first):
            continue
        total += holder.parameter.numel()
        if holder.parts[0].is_vocabulary:
            start, stop, local = span(holder.parts[0], world.tensor)
            total -= (local - (stop - start)) * holder.parameter.shape[1]
    return total


BY_DEFAULT = ("tower", "width", "cross_every2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each in BY_DEFAULT else pytest.mark.slow) for each in COUNTS],
)
def test_one_replica_holds_the_exact_count(name: str) -> None:
    config = ModelConfig.from_dict(read_settings(CONFIGS / "models" / f"{name}.yaml"))
    sizes = []
    for world in ranks_of_one_replica(LAYOUT, RANKS):
        model = JamModel(config, world, dtype=torch.bfloat16)
        sizes.append(local_size(model, world))
    assert len(sizes) == LAYOUT.tensor * LAYOUT.pipeline
    assert sum(sizes) == COUNTS[name]
