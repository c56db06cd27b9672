"""Ranks that share each sequence: who holds which tokens, and which groups there are."""

from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.context import context_share
from megatron_jam.parallel.world import World
from tests.helpers.pool import WorkerPool


def test_ranks_hold_a_piece_from_each_end() -> None:
    tokens = torch.arange(24).view(2, 12)
    shares = [context_share(tokens, rank, 3) for rank in range(3)]
    assert [share[0].tolist() for share in shares] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert torch.cat(shares, dim=1).sort(dim=1).values.equal(tokens)
    assert context_share(tokens, 0, 1) is tokens


def shares_of(world: World, tokens: torch.Tensor) -> dict[str, Any]:
    """This rank's groups, as global ranks, and its tokens by Megatron's function and ours."""
    axes = ("tensor", "context", "pipeline", "data", "replicas")
    groups = {name: dist.get_process_group_ranks(getattr(world, name).group) for name in axes}
    share = partial(get_batch_on_this_cp_rank, cp_group=world.groups.cp)
    if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters:
        share = partial(share, is_hybrid_cp=False)  # Megatron-Core 0.19
    theirs = share({"tokens": tokens.clone()})["tokens"]
    ours = context_share(tokens, world.context.rank, world.context.size)
    return {**groups, "same": torch.equal(theirs, ours), "tokens": ours.tolist()}


@pytest.mark.parametrize(
    ("parallel", "data", "expected"),
    [
        (
            ParallelConfig(context=2),
            1,
            {"tensor": [1], "context": [0, 1], "pipeline": [1], "data": [1], "replicas": [0, 1]},
        ),
        (
            ParallelConfig(context=2, tensor=2),
            1,
            {
                "tensor": [0, 1],
                "context": [1, 3],
                "pipeline": [1],
                "data": [1],
                "replicas": [1, 3],
            },
        ),
        (
            ParallelConfig(context=2, pipeline=2),
            1,
            {
                "tensor": [1],
                "context": [0, 1],
                "pipeline": [1, 3],
                "data": [1],
                "replicas": [0, 1],
            },
        ),
        (
            ParallelConfig(context=2),
            2,
            {
                "tensor": [1],
                "context": [0, 1],
                "pipeline": [1],
                "data": [1, 3],
                "replicas": [0, 1, 2, 3],
            },
        ),
    ],
    ids=["cp2", "cp2-tp2", "cp2-pp2", "cp2-dp2"],
)
def test_groups_and_shares_are_megatrons(
    parallel: ParallelConfig, data: int, expected: dict[str, list[int]], pool: WorkerPool
) -> None:
    """The groups of rank 1."""
    tokens = torch.arange(16).view(2, 8)
    seen = pool.run(shares_of, parallel, tokens, data=data)
    assert {name: seen[1][name] for name in expected} == expected
    assert all(rank["same"] for rank in seen)
    whole = {tuple(row) for rank in seen for row in rank["tokens"]}
    assert whole == {(0, 1, 6, 7), (2, 3, 4, 5), (8, 9, 14, 15), (10, 11, 12, 13)}
