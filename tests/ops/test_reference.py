"""The arithmetic that the samplers' specification rests on."""

from fractions import Fraction

import numpy as np
import torch

from megatron_jam.ops.reference import fused, philox_uniform, sampling_weights


def rounded_to_float32(exact: Fraction) -> float:
    """The float32 nearest to `exact`, the even one of two."""
    near = np.float32(float(exact))
    candidates = [
        np.nextafter(near, np.float32(-np.inf)),
        near,
        np.nextafter(near, np.float32(np.inf)),
    ]
    return float(
        min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), x.view(np.uint32) & 1))
    )


def test_fused_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5_000, generator=generator)
    scale = torch.exp2(torch.randint(-40, 10, (5_000,), generator=generator).float())
    c = torch.randn(5_000, generator=generator) * scale
    c[:1000] = -(a * b)[:1000]  # cancels: what is left is the error of the product
    # Halfway cases: 1 + 2^-24 + a trace that float64 alone would round away.
    a[-1], b[-1], c[-1] = 2.0**-24, 1 + 2.0**-23, 1.0
    a[-2], b[-2], c[-2] = -(2.0**-60), 1.0, 1 + 2.0**-23
    expected = [
        rounded_to_float32(Fraction(x) * Fraction(y) + Fraction(z))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert fused(a, b, c).tolist() == expected
    assert expected[-1] == 1 + 2.0**-23


def test_philox_gives_the_published_bits() -> None:
    # Random123's known answers for philox4x32-10 begin with counter 0, key 0.
    assert philox_uniform(0, 0, 0) == (0xE169C58D6627E8D5 >> 11) * 2.0**-53
    numbers = [philox_uniform(-1, offset, 3) for offset in range(-5000, 5000)]
    assert 0 <= min(numbers) < 1e-3
    assert 1 - 1e-3 < max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 5 / np.sqrt(12 * 10_000)


def test_weights_are_integers_close_to_the_exponential() -> None:
    logits = -torch.linspace(0, 30, 4001)
    weights = sampling_weights(logits, temperature=1.0)
    assert weights[0] == 2.0**36
    assert torch.equal(weights, weights.round())
    exact = 2.0**36 * torch.exp(logits.double())
    assert ((weights - exact).abs() <= 0.5 + 3e-6 * exact).all()
    assert weights[-1] == 0
