"""Tables add their gradients to the sums of Megatron's wrapper: what autograd would have made."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.loss import Reading, linear_cross_entropy
from megatron_jam.models.main_gradients import LookUp
from megatron_jam.parallel.world import World
from tests.helpers.pool import WorkerPool

ROWS, WIDTH, TOKENS = 40, 8, 33
BEFORE = 0.5
"""What the sums hold of the micro-batch before."""

READINGS = [
    Reading(start=0, stop=7, hidden=0, table=0),
    Reading(start=7, stop=30, hidden=1, table=1),
    Reading(start=30, stop=ROWS, hidden=0, table=0),
]


def table(dtype: torch.dtype, seed: int = 0) -> nn.Parameter:
    """Rows [n, d] as Megatron's wrapper leaves them."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator).to(dtype))
    weight.main_grad = torch.full(  # type: ignore[attr-defined]
        weight.shape, BEFORE, dtype=torch.promote_types(dtype, torch.float32)
    )
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_were_looked_up(dtype: torch.dtype) -> None:
    """A row that occurs often gets the sum of its slopes, in the sum's precision."""
    weight = table(dtype)
    numbers = torch.randint(3, 9, (2, 100), generator=torch.Generator().manual_seed(1))
    slopes = torch.randn(2, 100, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows = LookUp.apply(numbers, weight)
    assert torch.equal(rows, F.embedding(numbers, weight))
    rows.backward(slopes)
    due = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    due.index_add_(0, numbers.flatten(), slopes.double().flatten(0, 1))
    torch.testing.assert_close(weight.main_grad.double() - BEFORE, due, rtol=0, atol=1e-5)
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None, "Megatron's wrapper wants one where it overlaps the reduction"


def loss_of(
    world: World, dtype: torch.dtype, at_once: int, reports: bool | None, scale: float
) -> tuple[list[Tensor], list[Tensor], list[bool], list[bool]]:
    """Gradients of two states, what was added for two tables (or without `reports` autograd made),
    whether Megatron is told so, and whether it finds a gradient beside."""
    g = torch.Generator().manual_seed(3)
    states = [torch.randn(TOKENS, WIDTH, generator=g).to(dtype).requires_grad_() for _ in range(2)]
    tables = [table(dtype, seed) for seed in range(2)]
    labels, mask = torch.randint(ROWS, (TOKENS,), generator=g), torch.rand(TOKENS, generator=g)
    total, _ = linear_cross_entropy(
        states,
        tables,
        READINGS,
        labels,
        mask,
        num_real=ROWS,
        group=world.groups.tp,
        main_gradients=reports is not None,
        reports=bool(reports),
        at_once=at_once,
    )
    (total * scale).backward()
    if reports is None:
        sums = [each.grad for each in tables]
    else:
        sums = [each.main_grad - BEFORE for each in tables]
    told = [each.grad_added_to_main_grad for each in tables]
    return [each.grad for each in states], sums, told, [each.grad is not None for each in tables]


@pytest.mark.parametrize("at_once", [1 << 24, 10 * ROWS], ids=["whole", "pieces"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_output_rows(pool: WorkerPool, dtype: torch.dtype, tolerance: float, at_once: int) -> None:
    """Without a report the tables' other use has to tell; the sums have it all the same."""
    run = (loss_of, ParallelConfig(), dtype, at_once)
    states, due, *_ = pool.run(*run, None, 1.0)[0]
    for reports in (True, False):
        mine, sums, told, found = pool.run(*run, reports, 1.0)[0]
        assert told == found == [reports] * 2
        assert all(map(torch.equal, mine, states))
        for each, other in zip(sums, due, strict=True):
            assert each.dtype is torch.promote_types(dtype, torch.float32)
            assert float((each - other).norm() / other.norm()) < tolerance


def test_a_multiple_of_the_loss_is_refused(pool: WorkerPool) -> None:
    """Its gradients were added before it was scaled."""
    with pytest.raises(Exception, match="scaled"):
        pool.run(loss_of, ParallelConfig(), torch.float32, 1 << 24, True, 2.0)
