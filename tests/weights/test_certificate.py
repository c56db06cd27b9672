"""The certificate of a conversion: what it measures, and what it refuses."""

import math

import pytest
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.errors import UsageError
from megatron_jam.weights.certificate import LARGEST_DIFFERENCE, certify, fixed_prompts
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import pico_config, pico_tensors

CONFIG = pico_config("tower", num_layers=2, bias=True, affine_norm=True)
BIAS = "layers.1.main.ffn.fc2.bias"


def tensors(change: float = 0.0) -> dict[str, Tensor]:
    """A model in fp32, one of its biases changed."""
    found = {name: value.float() for name, value in pico_tensors(CONFIG).items()}
    found[BIAS][3] += change
    return found


def test_equal_models_are_told_so() -> None:
    found = certify(CONFIG, tensors().__getitem__, tensors().__getitem__)
    assert found["largest_difference"] == 0
    assert found["kl_divergence"] == 0
    assert found["same_likeliest"] == 1
    assert found["prompts"] == fixed_prompts(CONFIG).tolist()
    ids = {each for prompt in found["prompts"] for each in prompt}
    assert len(ids) == 2 * 32
    assert min(ids) < 20
    assert max(ids) > CONFIG.vocab_size - 20


def test_a_small_difference_is_measured() -> None:
    change, sides = 2e-5, []
    for value in (0.0, change):
        logits = reference_logits(CONFIG, tensors(value).__getitem__, fixed_prompts(CONFIG))
        sides.append(logits)
    due = float((sides[0] - sides[1]).abs().max())
    assert 0 < due < LARGEST_DIFFERENCE
    found = certify(CONFIG, tensors().__getitem__, tensors(change).__getitem__)
    assert found["largest_difference"] == pytest.approx(due, rel=1e-3)
    logs = [F.log_softmax(side.double(), dim=-1) for side in sides]
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert found["kl_divergence"] == pytest.approx(divergence, abs=1e-7)


@pytest.mark.parametrize("change", [0.01, math.nan, math.inf])
def test_another_model_is_refused(change: float) -> None:
    with pytest.raises(UsageError, match=r"differ from the source's by .*nothing was written"):
        certify(CONFIG, tensors().__getitem__, tensors(change).__getitem__)
