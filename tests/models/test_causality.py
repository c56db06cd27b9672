"""No position sees a later one, in either tower, through any number of bridges."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_jam.config.model import BridgeConfig, ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build
from tests.models.test_parity import PER_TOWER, WIDE, one_way, unequal

LENGTH, PLACES = 12, [1, 6, 11]


def with_bridges(config: ModelConfig, **settings: object) -> ModelConfig:
    values = {**config.__dict__, "bridges": BridgeConfig(**settings)}  # type: ignore[arg-type]
    return ModelConfig(**values)


CONFIGS = {
    "tower": pico_config("tower"),
    "every layer": with_bridges(pico_config("cross"), every=1),
    "no bridges": with_bridges(pico_config("cross"), every=0),
    "chameleon": with_bridges(pico_config("cross", **LLAMA, qk_norm=True), every=1, kv_norm=True),
    "one way": one_way(pico_config("cross")),
    "unequal": unequal(),
    "unequal, wide head": unequal(**WIDE, alignment=[0, 2, 3]),
    "unequal, own tables": unequal(**PER_TOWER),
}


@torch.no_grad()
def moved(world: World, path: Path) -> list[list[Tensor]]:
    """For each place: which positions [S] of each tower's states and of the logits change if the
    token there does."""
    folder = WeightsFolder(path)
    (model,) = build(folder, world, torch.float64)
    size = folder.config.vocab_size
    tokens = torch.randint(4, size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)[None]
    before = (*model.run_layers(tokens, positions), model(tokens, positions))
    result = []
    for place in PLACES:
        other = tokens.clone()
        other[0, place] = 4 + (tokens[0, place] - 3) % (size - 4)
        after = (*model.run_layers(other, positions), model(other, positions))
        result.append([(a != b).flatten(1).any(dim=1) for a, b in zip(before, after, strict=True)])
    return result


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_before_a_changed_token_moves(kind: str, tmp_path: Path, pool: WorkerPool) -> None:
    """And everything from it on does, in each tower and in the logits."""
    path = pico_folder(tmp_path / "model", CONFIGS[kind])
    ranks = pool.run(moved, ParallelConfig(), path)
    for place, changes in zip(PLACES, ranks[0], strict=True):
        assert len(changes) == len(CONFIGS[kind].tower_names) + 1
        for change in changes:
            assert not change[:place].any()
            assert change[place:].all()
