"""Sums of weights are exact, however many there are and however small, on every backend."""

import math

import pytest
import torch

from megatron_jam.ops.guided_sampling import guided_sample, truncated_probabilities
from tests.ops.sampling import assert_rows, random_logits, reference_rows


def test_the_longest_vocabulary_sums_exactly(backend) -> None:
    drawn = guided_sample(torch.zeros(1, 2**17), top_p=0.5, seed=3, offset=1)
    assert drawn.log_probability.item() == pytest.approx(-17 * math.log(2), rel=1e-7)
    assert truncated_probabilities(torch.zeros(1, 2**17), top_k=9).unique().tolist() == [2.0**-17]


@pytest.mark.parametrize("powers", [6.95, 7.05, 7.95, 8.05, 10.95, 11.05])
def test_many_equal_weights_sum_exactly(backend, powers) -> None:
    """So many powers of two below the largest that sums of a few bits come near their end."""
    logits = torch.full((1, 65_536), -powers * math.log(2))
    logits += 1e-3 * random_logits(1, 65_536, seed=9)
    logits[0, 40_000] = 0
    seed, offset, settings = torch.tensor([5]), torch.tensor([2]), {"top_p": 0.8}
    drawn = guided_sample(
        logits, seed=seed, offset=offset, truncated_log_probability=True, **settings
    )
    assert_rows(drawn, reference_rows(logits, None, None, seed, offset, **settings))
