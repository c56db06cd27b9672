import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jam.data.blend import Blend


class Numbers:
    """A data set whose sample is (its name, the index)."""

    def __init__(self, name):
        self.name = name

    def sample(self, index):
        return self.name, index


def make(weights):
    return Blend([Numbers(i) for i in range(len(weights))], weights)


def check_prefixes(weights, num_samples, bound):
    blend = make(weights)
    counts = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    for index in range(num_samples):
        number, local = blend.locate(index)
        assert local == counts[number]  # each set's samples in order, none left out or twice
        counts[number] += 1
        assert np.abs(counts - shares * (index + 1)).max() <= bound + 1e-9


def test_halves_alternate():
    assert [make([1, 1]).locate(i) for i in range(6)] in (
        [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)],
        [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2)],
    )


def test_one_set_is_itself():
    assert [make([0.3]).locate(i) for i in (0, 5, 10**15)] == [(0, 0), (0, 5), (0, 10**15)]


@pytest.mark.parametrize("weights", [[1, 1], [0.5, 0.3], [1, 1e-3], [1e-9, 1], [3, 97]])
def test_prefixes_of_two_sets_are_within_a_half(weights):
    check_prefixes(weights, 3000, 0.5)


@pytest.mark.parametrize(
    "weights",
    [[1, 2, 3], [1] * 17, [2.0**-i for i in range(30)], [0.98, 0.01, 0.01], [1e-12, 1, 1e-12]],
)
def test_prefixes_of_many_sets_are_within_two(weights):
    check_prefixes(weights, 2000, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_prefixes_at_any_weights(weights):
    check_prefixes(weights, 200, 2 if len(weights) > 2 else 0.5)


def test_far_indices_are_exact():
    weights = [0.7, 0.2, 0.1]
    blend = make(weights)
    start = 10**13
    found = [blend.locate(start + i) for i in range(1000)]
    for number, weight in enumerate(weights):
        locals_ = [local for each, local in found if each == number]
        assert locals_ == list(range(locals_[0], locals_[0] + len(locals_)))
        assert abs(locals_[0] - weight * start) < 3
        assert abs(len(locals_) - weight * 1000) < 4


def test_extreme_weights_never_leave_the_range():
    blend = make([1e-300, 1, 1e300])
    assert {blend.locate(i) for i in range(1000)} == {(2, i) for i in range(1000)}


def test_samples_are_the_sets():
    blend = make([2, 1])
    assert [blend.sample(i) for i in range(9)] == [blend.locate(i) for i in range(9)]
