"""What the samplers' tests share."""

import math

import torch
from torch import Tensor

from megatron_jam.ops.guided_sampling import GuidedSample, guided_sample
from megatron_jam.ops.reference import guided_sample_row


def random_logits(*shape: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def reference_rows(
    cond: Tensor, uncond: Tensor | None, legal: Tensor | None, seed: Tensor, offset: Tensor, **s
) -> list[tuple[int, float, float]]:
    """The specification, row by row; settings are numbers or lists."""
    return [
        guided_sample_row(
            cond[row],
            None if uncond is None else uncond[row],
            legal=None if legal is None else legal[row],
            seed=int(seed[row]),
            offset=int(offset[row]),
            **{name: value[row] if isinstance(value, list) else value for name, value in s.items()},
        )
        for row in range(len(cond))
    ]


def assert_rows(drawn: GuidedSample, expected: list[tuple[int, float, float]]) -> None:
    """Tokens to the bit; logarithms, which libraries round differently, to float32's last bits."""
    tokens, whole, truncated = (list(column) for column in zip(*expected, strict=True))
    assert drawn.tokens.tolist() == tokens
    assert drawn.truncated_log_probability is not None
    close = {"rtol": 3e-7, "atol": 1e-12}
    torch.testing.assert_close(drawn.log_probability, torch.tensor(whole), **close)
    torch.testing.assert_close(drawn.truncated_log_probability, torch.tensor(truncated), **close)


def counts_of(cond: Tensor, uncond: Tensor | None = None, *, num: int, **settings) -> Tensor:
    """`num` draws from one row, as counts per id."""
    counts = torch.zeros(cond.shape[-1], dtype=torch.int64)
    for start in range(0, num, 1 << 20):
        rows = min(1 << 20, num - start)
        tokens = guided_sample(
            cond.expand(rows, -1),
            None if uncond is None else uncond.expand(rows, -1),
            seed=torch.full((rows,), 11),
            offset=torch.arange(start, start + rows),
            **settings,
        ).tokens
        counts += torch.bincount(tokens, minlength=cond.shape[-1])
    return counts


def kept_by_definition(
    probabilities: Tensor, *, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """Which ids the filters keep, in float64 [V], as their documentation says."""
    p = probabilities.double()
    if top_k:
        larger = torch.tensor([(p > each).sum() for each in p])
        p = torch.where(larger < top_k, p, 0.0)
        p = p / p.sum()
    descending, order = p.sort(descending=True)
    before = descending.cumsum(0) - descending
    first = torch.searchsorted(-descending, -descending)  # of equal ones
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order] = before[first] < top_p if top_p < 1 else descending >= 0
    return kept & (p > 0) & (p >= min_p * p.max())


def assert_chi_squared(counts: Tensor, expected: Tensor, *, cells: int = 400) -> None:
    """Chi-squared below its quantile of 1 - 3e-7, over cells of like expected counts.

    Ids are sorted by what is expected of them and go into at most `cells` cells, each with ten or
    more expected counts, so that any number of draws tests any vocabulary.
    """
    order = expected.argsort(descending=True)
    counts, expected = counts[order].double(), expected[order].double()
    size = max(float(expected.sum()) / cells, 10.0)
    cell = ((expected.cumsum(0) - expected) / size).long()
    # The last cell may be short: it joins the one before.
    cell = cell.clamp(max=max(int(expected.sum() / size) - 1, 0))
    observed = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(0, cell, counts)
    wanted = torch.zeros_like(observed).index_add_(0, cell, expected)
    full = wanted > 0
    statistic = float(((observed - wanted)[full].square() / wanted[full]).sum())
    freedom = max(int(full.sum()) - 1, 1)
    # Wilson and Hilferty's cube, at five standard deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-squared {statistic:.1f} with {freedom} degrees of freedom"
