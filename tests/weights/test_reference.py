"""The reference forward sees no token behind the one it predicts."""

import pytest
import torch

from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import pico_config, pico_tensors


@pytest.mark.parametrize("kind", ["tower", "cross"])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_causal(kind: str, place: int) -> None:
    """In JAM-Cross also through the bridges."""
    config = pico_config(kind)
    tensors = pico_tensors(config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, config.vocab_size, (2, 12), generator=generator)
    other = tokens.clone()
    other[:, place] = (other[:, place] + 7) % config.vocab_size
    one = reference_logits(config, tensors.__getitem__, tokens)
    two = reference_logits(config, tensors.__getitem__, other)
    assert one.shape == (2, 12, config.vocab_size)
    moved = (one - two).abs().amax(dim=(0, 2))
    assert torch.all(moved[:place] == 0)
    assert torch.all(moved[place:] > 1e-6)
