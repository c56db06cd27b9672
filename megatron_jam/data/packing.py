"""From documents to blocks of context_length + 1 tokens, with random access.

The order of the documents is drawn anew for each epoch, as a pure function of (seed, epoch). Only
the bits of PCG64 are used, whose stream numpy keeps the same over its versions.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.data.indexed import IndexedSet
from megatron_jam.data.sample import Block

T = TypeVar("T")


class StreamPacking:
    """Contiguous slices of one endless stream: epoch after epoch of shuffled documents.

    Block i is the stream's tokens [i * n, i * n + n + 1) for n = context_length: its last token is
    the next block's first, so that each token is predicted exactly once.
    """

    def __init__(
        self, documents: IndexedSet, *, context_length: int, seed: tuple[int, ...]
    ) -> None:
        """Pack `documents`; `seed` is any tuple of integers >= 0."""
        self._documents = documents
        self._context_length = context_length
        self._seed = seed
        self._epochs = _Latest(self._shuffle)

    def block(self, index: int) -> Block:
        """Block `index`. O(log documents), but an epoch's first."""
        size = self._context_length + 1
        epoch, start = divmod(index * self._context_length, self._documents.num_tokens)
        pieces: list[NDArray[np.int64]] = []
        missing = size
        while missing:
            pieces += self._read(epoch, start, missing)
            missing = size - sum(len(piece) for piece in pieces)
            epoch, start = epoch + 1, 0
        return Block.of(pieces, size=size, pad=0)

    def _read(self, epoch: int, start: int, size: int) -> list[NDArray[np.int64]]:
        """The epoch's documents, or parts of them, from token `start` on: `size` tokens in all, or
        fewer at the epoch's end."""
        order, ends = self._epochs(epoch)
        place = int(np.searchsorted(ends, start, side="right"))
        pieces = []
        while size and place < len(order):
            number = order[place]
            offset = start - int(ends[place]) + int(self._documents.lengths[number])
            pieces.append(self._documents.document(number, offset, offset + size))
            start, size = start + len(pieces[-1]), size - len(pieces[-1])
            place += 1
        return pieces

    def _shuffle(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Document numbers in the epoch's order, and the tokens up to and with each, [n] both."""
        order = shuffled(self._documents.num_documents, seed=self._seed, epoch=epoch)
        return order, np.cumsum(self._documents.lengths[order], dtype=np.int64)


class DocumentPacking:
    """As many whole documents as fit into each block, then padding.

    The documents are taken in the epoch's order, none skipped to fill a gap; an epoch starts a
    block of its own. Documents longer than a block are left out, and counted in a warning.
    """

    def __init__(
        self, documents: IndexedSet, *, context_length: int, seed: tuple[int, ...], pad: int
    ) -> None:
        """Pack `documents`; `seed` is any tuple of integers >= 0, `pad` the padding's id.

        Raises:
            UsageError: no document fits.
        """
        self._documents = documents
        self._block_size = context_length + 1
        self._seed = seed
        self._pad = pad
        self._numbers = np.flatnonzero(documents.lengths <= self._block_size)
        num_left_out = documents.num_documents - len(self._numbers)
        if not len(self._numbers):
            raise UsageError(
                f"{documents.prefix}: every document is longer than context_length "
                f"{context_length}: raise it or set data.packing=stream"
            )
        if num_left_out:
            logger.warning(
                "%s: %d of %d documents are longer than context_length %d and are left out",
                *(documents.prefix, num_left_out, documents.num_documents, context_length),
            )
        self._epochs = _Latest(self._pack)
        self._block_ends: list[int] = []  # blocks up to and with each epoch that was asked for

    def block(self, index: int) -> Block:
        """Block `index`. O(log epochs), but an epoch's first."""
        while not self._block_ends or self._block_ends[-1] <= index:
            order, starts = self._epochs(len(self._block_ends))
            self._block_ends.append(sum(self._block_ends[-1:]) + len(starts) - 1)
        epoch = bisect_right(self._block_ends, index)
        number = index - (self._block_ends[epoch - 1] if epoch else 0)
        order, starts = self._epochs(epoch)
        numbers = order[starts[number] : starts[number + 1]]
        documents = [self._documents.document(each) for each in numbers]
        return Block.of(documents, size=self._block_size, pad=self._pad)

    def _pack(self, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """Document numbers in the epoch's order; where in it each block starts, and the end."""
        order = self._numbers[shuffled(len(self._numbers), seed=self._seed, epoch=epoch)]
        before = np.concatenate([[0], np.cumsum(self._documents.lengths[order], dtype=np.int64)])
        starts = [0]
        while starts[-1] < len(order):
            limit = before[starts[-1]] + self._block_size
            starts.append(int(np.searchsorted(before, limit, side="right")) - 1)
        return order, starts


def shuffled(size: int, *, seed: tuple[int, ...], epoch: int) -> NDArray[np.int64]:
    """A permutation of 0 .. size - 1, int64 [size], from (seed, epoch) alone."""
    bits = np.random.PCG64(np.random.SeedSequence((*seed, epoch))).random_raw(size)
    return np.argsort(bits, kind="stable")


class _Latest(Generic[T]):
    """A function of the epoch whose latest results are kept: a block touches two epochs at most
    times, and readers that run ahead a third."""

    def __init__(self, function: Callable[[int], T], num_kept: int = 3) -> None:
        self._function = function
        self._num_kept = num_kept
        self._results: dict[int, T] = {}

    def __call__(self, epoch: int) -> T:
        if epoch not in self._results:
            self._results[epoch] = self._function(epoch)
            if len(self._results) > self._num_kept:
                del self._results[next(iter(self._results))]
        return self._results[epoch]
