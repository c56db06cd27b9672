"""The parameter table: exact sizes of the paper's models, JamModel's own parameters, packing."""

from collections import defaultdict

import pytest
import torch

from megatron_jam.config.model import BridgeConfig, ModelConfig, TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import Parameter, num_parameters, parameter_table
from megatron_jam.models.sharding import COPIES, pack, unpack
from megatron_jam.parallel.world import World
from tests.helpers.pico import pico_config
from tests.helpers.pool import WorkerPool

PAPER_TOWER = TowerConfig(num_layers=32, hidden_size=4096, num_heads=32)


def paper_model(towers: dict[str, TowerConfig], every: int = 0) -> ModelConfig:
    """A model of the paper's vocabulary and context."""
    return ModelConfig(
        towers=towers, vocab_size=66056, max_positions=4096, bridges=BridgeConfig(every=every)
    )


def test_parent_has_6_7_billion_parameters() -> None:
    assert num_parameters(paper_model({"main": PAPER_TOWER})) == 6_729_801_728


def test_width_has_26_billion_parameters() -> None:
    wide = TowerConfig(num_layers=32, hidden_size=8192, num_heads=64)
    assert num_parameters(paper_model({"main": wide})) == 26_344_505_344


@pytest.mark.parametrize(
    ("every", "count"),
    [(0, 13_205_807_104), (1, 26_090_708_992), (2, 19_648_258_048), (4, 16_427_032_576)],
)
def test_cross_has_the_papers_sizes(every: int, count: int) -> None:
    """Table 4 of the paper: 13, 26, 19 and 16 B."""
    assert num_parameters(paper_model({"image": PAPER_TOWER, "text": PAPER_TOWER}, every)) == count


@pytest.mark.parametrize(
    ("every", "layers"), [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (9, [0])]
)
def test_bridges_follow_every_nth_layer(every: int, layers: list[int]) -> None:
    towers = {name: TowerConfig(num_layers=4, hidden_size=8, num_heads=2) for name in "ab"}
    config = ModelConfig(
        towers={"image": towers["a"], "text": towers["b"]},
        vocab_size=10,
        max_positions=4,
        bridges=BridgeConfig(every=every),
    )
    names = [entry.name for entry in parameter_table(config)]
    assert [i for i in range(4) if f"bridges.{i}.text.attention.q.weight" in names] == layers
    assert len(set(names)) == len(names)


def parameter_shapes(world: World, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of this rank's share of a model."""
    return {name: tuple(p.shape) for name, p in JamModel(config, world).named_parameters()}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("kind", ["tower", "cross"])
def test_table_is_what_the_model_holds(pool: WorkerPool, kind: str, plain: bool) -> None:
    config = pico_config(kind, bias=not plain, affine_norm=not plain)
    parts: dict[str, list[Parameter]] = defaultdict(list)
    for entry in parameter_table(config):
        parts[entry.module].append(entry)
    due = {
        module: (sum(entry.shape[0] for entry in entries), *entries[0].shape[1:])
        for module, entries in parts.items()
    }
    (held,) = pool.run(parameter_shapes, ParallelConfig(), config)
    assert held == due
    # tower: 2 tables and 4 x 6; cross: 2 tables, 4 x 2 x 6, 2 x 2 x 6 in bridges, the projection.
    if plain:
        assert len(parameter_table(config)) == {"tower": 26, "cross": 75}[kind]


@pytest.mark.parametrize(
    ("parallel", "num_ranks"), [(ParallelConfig(tensor=2, pipeline=2), 4)], ids=["tp2-pp2"]
)
def test_ranks_hold_every_weight_once(
    pool: WorkerPool, parallel: ParallelConfig, num_ranks: int
) -> None:
    """Split weights add up over the ranks; 322 token rows divide by 2, so nothing is padded."""
    config = pico_config("cross", bias=True, affine_norm=True)
    assert config.vocab_size == 322
    ranks = pool.run(parameter_shapes, parallel, config)
    assert len(ranks) == num_ranks
    split = {entry.module: entry.split for entry in parameter_table(config)}
    output = f"{COPIES}main"
    copies = [held.pop(output) for held in ranks if output in held]
    assert copies == [(161, 32)] * 2
    total = sum(
        torch.Size(shape).numel() / (1 if split[module] is not None else 2)
        for held in ranks
        for module, shape in held.items()
    )
    assert total == num_parameters(config)


def heads_entries(n: int, *, head_size: int) -> list[Parameter]:
    return [
        Parameter(name=f"p{i}", shape=(8, 3), module="fused", part=(i, n), unit=head_size)
        for i in range(n)
    ]


@pytest.mark.parametrize("n", [2, 3])
def test_pack_interleaves_heads(n: int) -> None:
    """[q head 0, k head 0, v head 0, q head 1, ...], whatever the order of the parts."""
    entries = heads_entries(n, head_size=4)
    tensors = [torch.arange(24.0).view(8, 3) + 100 * i for i in range(n)]
    due = torch.cat([t[head : head + 4] for head in (0, 4) for t in tensors])
    assert torch.equal(pack(tensors, entries), due)
    assert torch.equal(pack(tensors[::-1], entries[::-1]), due)


@pytest.mark.parametrize("shape", [(8, 3), (8,)])
def test_unpack_undoes_pack(shape: tuple[int, ...]) -> None:
    """Weights and biases."""
    entries = heads_entries(3, head_size=2)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _ in entries]
    back = unpack(pack(tensors, entries), entries)
    assert list(back) == ["p0", "p1", "p2"]
    assert all(torch.equal(back[f"p{i}"], t) for i, t in enumerate(tensors))
    (alone,) = heads_entries(1, head_size=2)
    assert pack(tensors[:1], [alone]) is tensors[0]
    assert unpack(tensors[0], [alone]) == {"p0": tensors[0]}
