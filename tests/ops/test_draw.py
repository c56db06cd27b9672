"""Random numbers that are a function of (key, index), against their specification, bit for bit."""

import math
import statistics

import numpy as np
import pytest
import torch

from megatron_jam.ops import reference
from megatron_jam.ops.draw import Kind, drawn

KINDS: list[Kind] = ["uniform", "cut_normal", "normal"]


def test_threefry_gives_the_published_words() -> None:
    """Random123's known answer for threefry4x32, 20 rounds, counter 0 and key 0."""
    assert reference.threefry(0, 0) == [0x9C6CA96A, 0xE17EAE66, 0xFC10ECD4, 0x5256A7D8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key", "start"), [(0, 0), (2**64 - 1, 61), (12345, 2**40 + 3)])
def test_equals_the_reference(kind: Kind, key: int, start: int) -> None:
    found, due = drawn(kind, key, start, 300, 0.02), reference.drawn(kind, key, start, 300, 0.02)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), due)


@pytest.mark.parametrize("kind", KINDS)
def test_any_stretch_is_drawn_by_itself(kind: Kind) -> None:
    """Also of what several threads draw."""
    count = 200_000
    whole = drawn(kind, 7, 0, count, 1.0)
    for start, stop in ((0, 1), (1, 1), (63, 65), (65_535, 131_073), (count - 3, count)):
        assert torch.equal(drawn(kind, 7, start, stop - start, 1.0), whole[start:stop])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(drawn(kind, 7, 0, count, 1.0), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(drawn(kind, 8, 0, 100, 1.0), whole[:100])


@pytest.mark.parametrize("kind", KINDS)
def test_distribution(kind: Kind) -> None:
    """Kolmogorov-Smirnov's distance, whose mean is 0.87 / sqrt(n), and the ends."""
    count = 1_000_000
    values = drawn(kind, 1, 0, count, 2.0).double().sort().values / 2
    part = math.erf(3 / math.sqrt(2)) if kind == "cut_normal" else 1.0
    due = (
        (values + 1) / 2 if kind == "uniform" else 0.5 + torch.erf(values / math.sqrt(2)) / 2 / part
    )
    distance = (due - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 2 / math.sqrt(count)
    most = float(values.abs().max())
    low, high = {"uniform": (1 - 1e-4, 1), "cut_normal": (2.99, 3), "normal": (4, 5.4)}[kind]
    assert low < most < high


def test_the_far_quantiles_equal_the_reference() -> None:
    """Numbers beyond 3.3 sigma, of which there is one in a thousand, out of a million."""
    found = drawn("normal", 3, 0, 1_000_000, 1.0).numpy()
    far = np.flatnonzero(np.abs(found) > 3.3)
    assert 800 < len(far) < 1150  # 967 are expected, 31 their standard deviation
    assert np.abs(found).max() > 4.5
    extreme = far[np.argsort(-np.abs(found[far]))[:300]]
    due = [reference.drawn("normal", 3, int(i), 1, 1.0)[0] for i in extreme]
    assert np.array_equal(found[extreme], np.array(due))


def test_quantiles_are_the_normal_distributions() -> None:
    """Of all u that there are, some thousand, among them the outermost."""
    normal = statistics.NormalDist()
    words = [*range(0, 2**23, 9973), 2**23 - 1]
    u = (2 * np.array(words) + 1) / 2**23 - 1
    w = -np.log1p(-u * u)
    near = reference._polynomial(reference.QUANTILE_NEAR, (w - 2.625).astype(np.float32))
    far = reference._polynomial(reference.QUANTILE_FAR, (w - 10.275).astype(np.float32))
    found = u * np.where(w > 5.25, far, near)
    due = np.array([normal.inv_cdf((1 + each) / 2) for each in u])
    assert np.max(np.abs(found / due - 1)) < 1e-6


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown kind cauchy"):
        drawn("cauchy", 0, 0, 1, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out is no vector"):
        drawn("normal", 0, -1, 1, 1.0)
