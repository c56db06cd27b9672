"""A weighted blend of data sets as a function of the sample's index: no index files, no state."""

import heapq
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from megatron_jam.data.sample import Dataset, Sample

# Shares are integers over 2**53, so that the split is exact at any index; doubles have 53 bits.
_SHARE_BITS = 53


class _Split(NamedTuple):
    """Of the first i samples, floor(i * share + 1/2) are the left side's."""

    share: int
    left: "_Split | int"
    right: "_Split | int"


class Blend:
    """Sample i of the blend is sample j of one set; each set's own samples come in order.

    The sets are the leaves of a Huffman tree of two-way splits, so that finding (set, j) takes
    O(log of the number of sets) splits on average. In any prefix each set's count is within 2 of
    its weight's due, and within 1/2 with two sets: a split is off by at most 1/2 and hands on its
    side's share of the error above, which in a Huffman tree is at most 2/3 for all but leaves.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        """Blend `datasets`, one or more, by `weights`, positive and relative to their sum."""
        self._datasets = list(datasets)
        self.epoch_sizes = [each.epoch_size for each in datasets]
        """Samples in an epoch of each set."""
        self.epoch_tokens = [each.epoch_tokens for each in datasets]
        """Tokens in the same, without padding."""
        self.epoch_size = sum(self.epoch_sizes)
        """Samples in an epoch of all sets."""
        self._root = _huffman(weights)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the set, and the index within it, of the blend's sample `index`."""
        node = self._root
        while isinstance(node, _Split):
            num_left = _num_left(node.share, index)
            if _num_left(node.share, index + 1) > num_left:
                node, index = node.left, num_left
            else:
                node, index = node.right, index - num_left
        return node, index

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        number, local = self.locate(index)
        block, pad, _, _, counted = self._datasets[number].sample(local)
        return Sample(block, pad, index, number, counted)

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples are each set's."""
        counts = [0] * len(self._datasets)
        waiting: list[tuple[_Split | int, int]] = [(self._root, num_samples)]
        while waiting:
            node, size = waiting.pop()
            if isinstance(node, _Split):
                num_left = _num_left(node.share, size)
                waiting += [(node.left, num_left), (node.right, size - num_left)]
            else:
                counts[node] = size
        return counts


def _num_left(share: int, index: int) -> int:
    return (index * share + (1 << (_SHARE_BITS - 1))) >> _SHARE_BITS


def _huffman(weights: Sequence[float]) -> _Split | int:
    order = count()  # decides between equal weights, so that the tree is always the same
    heap: list[tuple[float, int, _Split | int]] = [
        (weight, next(order), number) for number, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        light, _, right = heapq.heappop(heap)
        heavy, _, left = heapq.heappop(heap)
        share = round(heavy / (light + heavy) * (1 << _SHARE_BITS))
        heapq.heappush(heap, (light + heavy, next(order), _Split(share, left, right)))
    return heap[0][2]
