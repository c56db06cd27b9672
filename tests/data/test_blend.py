import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jam.data.blend import Blend
from megatron_jam.data.sample import Sample


class Numbers:
    """A data set whose samples hold its name and the index."""

    epoch_size = epoch_tokens = 10

    def __init__(self, name):
        self.name = name

    def sample(self, index):
        return Sample((self.name, index), pad=0, index=index)


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


def test_samples_are_the_sets_and_say_which():
    blend = make([2, 1])
    samples = [blend.sample(i) for i in range(9)]
    assert [each.block for each in samples] == [blend.locate(i) for i in range(9)]
    assert [each.index for each in samples] == list(range(9))
    assert [each.dataset for each in samples] == [blend.locate(i)[0] for i in range(9)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.integers(0, 300))
def test_counts_are_what_is_found(weights, num_samples):
    blend = make(weights)
    found = [blend.locate(i)[0] for i in range(num_samples)]
    assert blend.counts(num_samples) == [found.count(i) for i in range(len(weights))]
    far = blend.counts(10**15)
    assert sum(far) == 10**15
    assert max(abs(n - 10**15 * w / sum(weights)) for n, w in zip(far, weights, strict=True)) < 3


def test_finding_a_sample_takes_few_splits():
    """Of 1,024 sets of one weight each is ten splits deep; by weights, the heavy ones less."""
    blend = make([1] * 1024)
    assert set(depths(blend._root)) == {10}
    weights = [2.0**-i for i in range(30)]
    mean = sum(w * d for w, d in zip(weights, depths(make(weights)._root), strict=True))
    assert mean / sum(weights) < 2


def depths(node, depth=0):
    """How deep each set lies, by number."""
    found = {}

    def visit(node, depth):
        if isinstance(node, int):
            found[node] = depth
        else:
            visit(node.left, depth + 1)
            visit(node.right, depth + 1)

    visit(node, depth)
    return [found[number] for number in sorted(found)]
