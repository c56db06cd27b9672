"""Output rows with cross-entropy, split and in pieces, are torch's over all logits at once."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.embedding import num_real_rows, padded_vocabulary
from megatron_jam.models.loss import Reading, linear_cross_entropy
from megatron_jam.parallel.world import World
from tests.helpers.pool import WorkerPool

TOKENS, WIDTHS = 21, (6, 10)
# Rows that read the second state from the second table; the others read the first from the first.
TEXT = (2, 60)


def material(
    vocabulary: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """States [T, d], tables [V, d], labels with the first and last id, a weight a token."""
    g = torch.Generator().manual_seed(0)
    states = [torch.randn(TOKENS, d, generator=g, dtype=torch.float64) * 3 for d in WIDTHS]
    tables = [torch.randn(vocabulary, d, generator=g, dtype=torch.float64) for d in WIDTHS]
    labels = torch.randint(vocabulary, (TOKENS,), generator=g)
    labels[0], labels[1] = 0, vocabulary - 1
    mask = torch.rand(TOKENS, generator=g)
    return [s.to(dtype) for s in states], [t.to(dtype) for t in tables], labels, mask


def direct(
    states: list[Tensor],
    tables: list[Tensor],
    labels: Tensor,
    mask: Tensor,
    exact: torch.dtype,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The weighted sum, each token's loss, and the gradients of twice the sum, in `exact`."""
    tensors = [each.to(exact).requires_grad_() for each in (*states, *tables)]
    one, other = (tensors[i] @ tensors[i + 2].T for i in range(2))
    ids = torch.arange(one.shape[1])
    logits = torch.where((ids >= TEXT[0]) & (ids < TEXT[1]), other, one)
    losses = F.cross_entropy(logits, labels, reduction="none")
    total = ((losses + z_loss * logits.logsumexp(-1) ** 2) * mask).sum()
    return total.detach(), losses.detach(), list(torch.autograd.grad(2 * total, tensors))


def split(
    world: World, vocabulary: int, dtype: torch.dtype, at_once: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sum, each token's loss, and this rank's gradients; padding holds large rows."""
    states, tables, labels, mask = material(vocabulary, dtype)
    rows = padded_vocabulary(vocabulary, world.tensor.size)
    local = rows // world.tensor.size
    first = world.tensor.rank * local
    shares = [
        F.pad(table, (0, 0, 0, rows - vocabulary), value=1e4)[first : first + local]
        for table in tables
    ]
    cuts = [min(max(place - first, 0), local) for place in (0, *TEXT, rows)]
    readings = [
        Reading(start=a, stop=b, hidden=i % 2, table=i % 2)
        for i, (a, b) in enumerate(itertools.pairwise(cuts))
        if a < b
    ]
    tensors = [each.clone().requires_grad_() for each in (*states, *shares)]
    loss = partial(
        linear_cross_entropy,
        tensors[:2],
        tensors[2:],
        readings,
        labels,
        mask,
        num_real=num_real_rows(vocabulary, world),
        group=world.groups.tp,
        z_loss=z_loss,
        at_once=at_once,
    )
    total, losses = loss()
    assert not losses.requires_grad
    gradients = torch.autograd.grad(2 * total, tensors)
    with torch.no_grad():
        alone = loss()
    assert torch.equal(alone[1], losses)
    return total.detach(), losses, list(gradients)


def joined(results: list[tuple[Tensor, Tensor, list[Tensor]]], vocabulary: int) -> list[Tensor]:
    """Gradients of the states, summed over the ranks, and of the whole tables."""
    gradients = [each[2] for each in results]
    tables = [torch.cat([each[i] for each in gradients]) for i in (2, 3)]
    assert all(torch.count_nonzero(table[vocabulary:]) == 0 for table in tables)
    states = [torch.stack([each[i] for each in gradients]).sum(0) for i in (0, 1)]
    return states + [table[:vocabulary] for table in tables]


# 5 ids at TP=4 leave the last rank nothing but padding; 300 logits are a few tokens at a time.
@pytest.mark.parametrize(("vocabulary", "at_once"), [(101, 300), (101, 1 << 24), (5, 7)])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "z_loss"),
    [(torch.float64, 1e-11, 0.0), (torch.float32, 1e-5, 0.0), (torch.float64, 1e-11, 0.03)],
    ids=["fp64", "fp32", "z"],
)
def test_equals_torch(
    pool: WorkerPool,
    vocabulary: int,
    at_once: int,
    tensor: int,
    dtype: torch.dtype,
    tolerance: float,
    z_loss: float,
) -> None:
    states, tables, labels, mask = material(vocabulary, dtype)
    due, losses, gradients = direct(states, tables, labels, mask, torch.float64, z_loss)
    parallel = ParallelConfig(tensor=tensor)
    results = pool.run(split, parallel, vocabulary, dtype, at_once, z_loss)
    for total, values, _ in results:
        assert values.dtype is dtype
        torch.testing.assert_close(values.double(), losses, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(total.double(), due, rtol=tolerance, atol=tolerance)
    for mine, slope in zip(joined(results, vocabulary), gradients, strict=True):
        torch.testing.assert_close(mine.double(), slope, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("tensor", [1, 2])
def test_bf16_is_summed_in_fp32(pool: WorkerPool, tensor: int) -> None:
    states, tables, labels, mask = material(101, torch.bfloat16)
    _, losses, gradients = direct(states, tables, labels, mask, torch.float64)
    results = pool.run(split, ParallelConfig(tensor=tensor), 101, torch.bfloat16, 300)
    for _, values, _ in results:
        assert values.dtype is torch.float32
        # A logit of size 32 is rounded to 1/8, half of which is off at most, on either side.
        torch.testing.assert_close(values.double(), losses, rtol=0, atol=0.25)
        assert float((values.double() - losses).abs().mean()) < 0.05
    for mine, due in zip(joined(results, 101), gradients, strict=True):
        assert mine.dtype is torch.bfloat16
        assert float((mine.double() - due).norm() / due.norm()) < 0.03
