"""Parity certificates: what shows that a converted model is the one that it was made from.

Both sides run through the plain reference, one layer at a time, on prompts that depend on nothing
but the vocabulary; so does whoever checks the folder later. Prompts reach few rows of the tables:
so every tensor of the two is compared too. The source's tensors have their canonical names by then:
what is shown is that merging, ordering and writing changed nothing. That a name stands for the
right tensor is shown by the tests, against transformers' models, and by tools/logits.py beside the
other program.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.weights.reference import reference_logits

PROMPTS, LENGTH = 2, 32
LARGEST_DIFFERENCE = 1e-4
"""Of two logits in fp32."""
_BLOCK_BYTES = 4 << 20
"""Of a tensor's rows that are compared at once."""


def fixed_prompts(config: ModelConfig) -> Tensor:
    """Ids int64 [2, 32], or as long as the model's positions: spread over the whole vocabulary."""
    length = min(LENGTH, config.max_positions)
    places = torch.arange(PROMPTS * length, dtype=torch.int64)
    # A prime that no usual size is a multiple of: ids from all over, each run of them another.
    return (places * 7_368_787 % config.vocab_size).view(PROMPTS, length)


def certify(
    config: ModelConfig,
    source: Callable[[str], Tensor],
    result: Callable[[str], Tensor],
    *,
    order: Tensor | None = None,
    stored: Callable[[str], Tensor] | None = None,
) -> dict[str, Any]:
    """Compare the tensors of two sets of weights, and their logits in fp32.

    Args:
        config: the model.
        source: gives each tensor, by canonical name, of what was converted.
        result: gives those of what came out.
        order: the source's id of each of the result's, int64 [V]; None where they are the same.
        stored: gives the source's tensors in their own dtype, where `source` converts them.

    Returns:
        Largest difference of two logits, KL divergence (nats a token), share of tokens with the
        same likeliest follower, and the prompts.

    Raises:
        UsageError: if a number of the result is not the source's, rounded to the result's dtype;
            or a difference of logits is above 1e-4, or one is not finite.
    """
    for entry in parameter_table(config):
        _compare(entry, (stored or source)(entry.name), result(entry.name), order)
    prompts = fixed_prompts(config)
    order = torch.arange(config.vocab_size) if order is None else order
    expected, found = (
        reference_logits(config, lambda name, get=get: get(name).float(), ids)
        for get, ids in ((source, order[prompts]), (result, prompts))
    )
    expected = expected[..., order]
    difference = float((expected - found).abs().max())
    logs, other = F.log_softmax(expected, dim=-1), F.log_softmax(found, dim=-1)
    if not difference <= LARGEST_DIFFERENCE:
        raise UsageError(
            f"the result's logits differ from the source's by {difference:.3g}, more than"
            f" {LARGEST_DIFFERENCE:g}: nothing was written"
        )
    return {
        "prompts": prompts.tolist(),
        "largest_difference": difference,
        "kl_divergence": float((logs.exp() * (logs - other)).sum(dim=-1).mean()),
        "same_likeliest": float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
    }


def _compare(entry: Parameter, source: Tensor, result: Tensor, order: Tensor | None) -> None:
    """Raise UsageError unless a tensor is the source's: the same numbers, after rounding."""
    is_same = source.shape == result.shape
    rows = len(result) if is_same else 0
    step = max(1, _BLOCK_BYTES * rows // max(1, result.nbytes))
    for start in range(0, rows, step):
        found = result[start : start + step]
        if order is None or not entry.is_vocabulary:
            due = source[start : start + step]
        else:
            due = source[order[start : start + step]]
        due = due.to(found.dtype)
        # What is no number is the logits' to refuse, where it counts.
        is_same = is_same and (
            torch.equal(due, found) or torch.allclose(due, found, rtol=0, atol=0, equal_nan=True)
        )
    if not is_same:
        raise UsageError(
            f"{entry.name} of the result differs from the source's: nothing was written"
        )
