"""Parity certificates: what shows that a converted model is the one that it was made from.

Both sides run through the plain reference, one layer at a time, on prompts that depend on nothing
but the vocabulary; so does whoever checks the folder later. The source's tensors have their
canonical names by then: what is shown is that merging, ordering and writing changed nothing. That a
name stands for the right tensor is shown by the tests, against transformers' models, and by
tools/logits.py beside the other program.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.weights.reference import reference_logits

PROMPTS, LENGTH = 2, 32
LARGEST_DIFFERENCE = 1e-4
"""Of two logits in fp32."""


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
) -> dict[str, Any]:
    """Compare the logits of two sets of weights in fp32.

    Args:
        config: the model.
        source: gives each tensor, by canonical name, of what was converted.
        result: gives those of what came out.
        order: the source's id of each of the result's, int64 [V]; None where they are the same.

    Returns:
        Largest difference of two logits, KL divergence (nats a token), share of tokens with the
        same likeliest follower, and the prompts.

    Raises:
        UsageError: if a difference is above 1e-4, or a number is not finite.
    """
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
