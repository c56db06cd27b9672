"""From documents to blocks of context_length + 1 tokens, with random access.

The order of the documents is drawn anew for each epoch, as a pure function of (seed, epoch). Only
the bits of PCG64 are used, whose stream numpy keeps the same over its versions.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.data.index_cache import IndexCache
from megatron_jam.data.indexed import IndexedSet
from megatron_jam.data.sample import Block
from megatron_jam.ops.extension import pack_greedily, read_stream

T = TypeVar("T")


class _Order(NamedTuple):
    """An epoch's order, and the stream of tokens that it makes of the documents."""

    numbers: NDArray[np.uint32]
    """Document numbers in the epoch's order, [n]."""

    ends: NDArray[np.int64]
    """Tokens up to and with each, [n]."""


class _Reader:
    """Reads blocks out of a set's documents in the order of an epoch. In C++."""

    def __init__(self, documents: IndexedSet, size: int, pad: int) -> None:
        self._documents = documents
        self._size = size
        self._pad = pad

    def __call__(self, parts: Iterable[tuple[_Order, int, int]]) -> Block:
        """The tokens [start, stop) of each (order, start, stop) in a row, then padding."""
        tokens = np.empty(self._size, dtype=np.int32)
        documents = np.empty(self._size, dtype=np.int32)
        filled = number = 0
        for order, start, stop in parts:
            filled, number = read_stream(
                self._documents.all_tokens,
                self._documents.starts,
                *order,
                start,
                stop,
                filled,
                number,
                tokens,
                documents,
            )
        if filled < self._size:
            tokens[filled:], documents[filled:] = self._pad, number
        return Block(tokens, documents)


class StreamPacking:
    """Contiguous slices of one endless stream: epoch after epoch of shuffled documents.

    Block i is the stream's tokens [i * n, i * n + n + 1) for n = context_length: its last token is
    the next block's first, so that each token is predicted exactly once.
    """

    def __init__(
        self,
        documents: IndexedSet,
        *,
        context_length: int,
        seed: tuple[int, ...],
        cache: IndexCache | None = None,
    ) -> None:
        """Pack `documents`; `seed` is any tuple of integers >= 0, `cache` keeps epochs' orders."""
        self._num_tokens = documents.num_tokens
        self._context_length = context_length
        self._epochs = _Epochs(documents, None, seed, cache or IndexCache(None))
        self._read = _Reader(documents, context_length + 1, 0)
        self.epoch_size = self._num_tokens / context_length

    def block(self, index: int) -> Block:
        """Block `index`. O(log documents), but an epoch's first."""
        return self._read(self._parts(index))

    def _parts(self, index: int) -> Iterator[tuple[_Order, int, int]]:
        epoch, start = divmod(index * self._context_length, self._num_tokens)
        missing = self._context_length + 1
        while missing:
            stop = min(start + missing, self._num_tokens)
            yield self._epochs(epoch), start, stop
            missing -= stop - start
            epoch, start = epoch + 1, 0


class DocumentPacking:
    """As many whole documents as fit into each block, then padding.

    The documents are taken in the epoch's order, none skipped to fill a gap; an epoch starts a
    block of its own. Documents longer than a block are left out, and counted in a warning.
    """

    def __init__(
        self,
        documents: IndexedSet,
        *,
        context_length: int,
        seed: tuple[int, ...],
        pad: int,
        cache: IndexCache | None = None,
    ) -> None:
        """Pack `documents`; `seed` is any tuple of integers >= 0, `pad` the padding's id.

        Raises:
            UsageError: no document fits.
        """
        self._block_size = context_length + 1
        numbers = np.flatnonzero(documents.lengths <= self._block_size).astype(np.uint32)
        num_left_out = documents.num_documents - len(numbers)
        if not len(numbers):
            raise UsageError(
                f"{documents.prefix}: every document is longer than context_length "
                f"{context_length}: raise it or set data.packing=stream"
            )
        if num_left_out:
            logger.warning(
                "%s: %d of %d documents are longer than context_length %d and are left out",
                *(documents.prefix, num_left_out, documents.num_documents, context_length),
            )
        self._read = _Reader(documents, self._block_size, pad)
        self._epochs = _Epochs(
            documents, numbers if num_left_out else None, seed, cache or IndexCache(None)
        )
        self._starts = _Latest(self._pack)
        self._lock = Lock()
        self._block_ends: list[int] = []  # blocks up to and with each epoch that was asked for
        self.epoch_size = float(len(self._starts(0)) - 1)

    def block(self, index: int) -> Block:
        """Block `index`. O(log epochs), but an epoch's first."""
        with self._lock:
            while not self._block_ends or self._block_ends[-1] <= index:
                starts = self._starts(len(self._block_ends))
                self._block_ends.append(sum(self._block_ends[-1:]) + len(starts) - 1)
        epoch = bisect_right(self._block_ends, index)
        number = index - (self._block_ends[epoch - 1] if epoch else 0)
        starts = self._starts(epoch)
        return self._read([(self._epochs(epoch), int(starts[number]), int(starts[number + 1]))])

    def _pack(self, epoch: int) -> NDArray[np.int64]:
        """Where in the epoch's tokens each block starts, and the end, [blocks + 1]."""
        return pack_greedily(self._epochs(epoch).ends, self._block_size)


class _Epochs:
    """The order of a set's documents, or of some of them, in each epoch."""

    def __init__(
        self,
        documents: IndexedSet,
        numbers: NDArray[np.uint32] | None,
        seed: tuple[int, ...],
        cache: IndexCache,
    ) -> None:
        if documents.num_documents > np.iinfo(np.uint32).max:
            raise UsageError(f"{documents.prefix} has more than 2^32 documents: split it")
        self._lengths = documents.lengths
        self._numbers = numbers
        self._seed = seed
        self._cache = cache
        self._inputs = cache.digest(documents.lengths, *([] if numbers is None else [numbers]))
        self._latest = _Latest(self._order)

    def __call__(self, epoch: int) -> _Order:
        return self._latest(epoch)

    def _order(self, epoch: int) -> _Order:
        key = ("order 1", self._inputs, self._seed, epoch)
        return _Order(*self._cache.arrays(key, _Order._fields, lambda: self._shuffle(epoch)))

    def _shuffle(self, epoch: int) -> Sequence[NDArray]:
        size = len(self._lengths) if self._numbers is None else len(self._numbers)
        order = shuffled(size, seed=self._seed, epoch=epoch).astype(np.uint32)
        if self._numbers is not None:
            order = self._numbers[order]
        return order, np.cumsum(self._lengths[order], dtype=np.int64)


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
        self._lock = Lock()

    def __call__(self, epoch: int) -> T:
        with self._lock:
            if epoch not in self._results:
                self._results[epoch] = self._function(epoch)
                if len(self._results) > self._num_kept:
                    del self._results[next(iter(self._results))]
            return self._results[epoch]
