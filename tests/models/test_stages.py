"""Which layers a stage gets, by number and by cost, and that an uneven split changes no result."""

from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.stages import balanced_sizes, layer_costs, stage_layers
from tests.helpers.pico import pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance, loss_and_gradients, random_batch

SMALL = pico_config(
    "tower", num_layers=5, hidden_size=8, num_heads=2, ffn_size=8, activation="gelu"
)
"""A tower whose head costs nearly three of its layers."""

FIVE = pico_config("cross", num_layers=5, bias=True, affine_norm=True, activation="gelu")


def split(model: ModelConfig, parallel: ParallelConfig) -> list[list[int]]:
    """Each chunk's layers, in the order of the forward pass."""
    return [
        list(stage_layers(model, parallel, stage=stage, chunk=chunk))
        for chunk in range(parallel.interleave)
        for stage in range(parallel.pipeline)
    ]


def best_by_trying(costs: tuple[int, ...], chunks: int) -> tuple[int, ...]:
    """The rule of `balanced_sizes`, over every split there is."""

    def rank(sizes: tuple[int, ...]) -> tuple:
        ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        sums = [sum(costs[a:b]) for a, b in pairwise(ends)]
        return max(sums), sum(each**2 for each in sums), sizes[::-1]

    num = len(costs)
    cuts = ((0, *inner, num) for inner in combinations(range(1, num), chunks - 1))
    return min((tuple(b - a for a, b in pairwise(cut)) for cut in cuts), key=rank)


def test_equal_numbers_of_layers() -> None:
    parallel = ParallelConfig(pipeline=2, interleave=2)
    assert split(FIVE, parallel) == [[0, 1], [2], [3], [4]]


def test_stages_need_layers() -> None:
    parallel = ParallelConfig(pipeline=4, interleave=2)
    with pytest.raises(UsageError, match="needs at least 8 layers; the model has 5"):
        stage_layers(FIVE, parallel, stage=0, chunk=0)


@pytest.mark.parametrize("seed", range(30))
def test_balance_is_the_best_split(seed: int) -> None:
    random = Random(seed)
    costs = tuple(random.randint(1, 6) for _ in range(random.randint(4, 10)))
    for chunks in range(1, 5):
        assert balanced_sizes(costs, chunks) == best_by_trying(costs, chunks), (costs, chunks)


def test_balance_counts_the_head_and_prefers_even_splits() -> None:
    """Four stages of a tower of 32 equal layers whose head costs more than one of them."""
    assert balanced_sizes((10,) * 31 + (23,), 4) == (9, 8, 8, 7)
    assert balanced_sizes((1, 1, 1, 50), 2) == (3, 1)


def test_costs_are_counted_by_hand() -> None:
    """d 32, FFN 128, 64 positions, 322 ids, bridges behind layers 0, 2 and 4."""
    attention = 2 * (4 * 32 * 32) + 2 * 32 * 65
    block = attention + 2 * (2 * 32 * 128)
    head = 2 * 64 * 32 + 2 * 322 * 32
    due = [4 * block, 2 * block, 4 * block, 2 * block, 4 * block + head]
    assert FIVE.vocab_size == 322
    assert layer_costs(FIVE) == due


def test_costs_move_layers() -> None:
    """Bridges stand behind layers 0, 2 and 4, and the head behind the last one."""
    parallel = ParallelConfig(pipeline=2, balance="cost")
    assert split(FIVE, parallel) == [[0, 1, 2], [3, 4]]
    assert split(SMALL, parallel) == [[0, 1, 2, 3], [4]]
    assert split(SMALL, ParallelConfig(pipeline=2)) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("balance", ["even", 3])
def test_balance_is_one_of_two(balance: object) -> None:
    with pytest.raises(UsageError, match=r"parallel.balance is .*choose one of layers, cost"):
        ParallelConfig(balance=balance)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pipeline=2, balance="cost"),
        ParallelConfig(pipeline=2, interleave=2, balance="cost"),
        ParallelConfig(tensor=2, pipeline=2, sequence=True, balance="cost"),
    ],
    ids=["pp2", "pp2-interleaved", "tp2-pp2-sp"],
)
@pytest.mark.parametrize("kind", ["cross", "tower"])
def test_uneven_stages_agree_with_one_rank(
    pool: WorkerPool, kind: str, parallel: ParallelConfig, tmp_path: Path
) -> None:
    """Five layers, which two stages and four chunks do not divide, in float64; micro-batches of two
    samples, whose states must not lie sample by sample when they are sent."""
    config = FIVE if kind == "cross" else SMALL
    sizes = {len(layers) for layers in split(config, parallel)}
    assert len(sizes) > 1
    path = pico_folder(tmp_path / "model", config)
    run = (path, random_batch(config.vocab_size, samples=4, length=16), torch.float64)
    loss, gradients = pool.run(loss_and_gradients, ParallelConfig(), *run)[0]
    other_loss, other_gradients = pool.run(loss_and_gradients, parallel, *run, "none", 2)[0]
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert distance(gradients, other_gradients) < 1e-7
