"""From documents to blocks of context_length + 1 tokens, with random access.

The order of the documents is drawn anew for each epoch, and so is what stands in front of them, as
a pure function of (seed, epoch). Only the bits of PCG64 are used, whose stream numpy keeps the same
over its versions, and Philox.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.data import RetrievedConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.data.index_cache import IndexCache
from megatron_jam.data.indexed import IndexedSet
from megatron_jam.data.sample import Block, sample_key
from megatron_jam.ops.extension import Order, Reader, pack_greedily

T = TypeVar("T")


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
        retrieved: RetrievedConfig | None = None,
        cache: IndexCache | None = None,
    ) -> None:
        """Pack `documents`; `seed` is any tuple of integers >= 0, `cache` keeps epochs' orders.

        Raises:
            UsageError: the set has less than a block, which would hold a document twice.
        """
        self._context_length = context_length
        self._size = context_length + 1
        self._epochs = Epochs(documents, seed, retrieved=retrieved, cache=cache)
        num_tokens = self._epochs.num_tokens(0)
        if num_tokens < self._size:
            raise UsageError(
                f"{documents.prefix} has {num_tokens} tokens, less than a sample of context_length "
                f"{context_length}: lower it, prepare more or set data.packing=documents"
            )
        self._read = Reader(
            Block,
            documents.all_tokens,
            documents.starts,
            self._epochs.retrieval,
            size=self._size,
            pad=0,
        ).read
        self._here: tuple[int, int, list[Order]] = (0, 0, [])
        self.epoch_size = num_tokens / context_length
        self.epoch_tokens = num_tokens

    def block(self, index: int) -> Block:
        """Block `index`. O(log documents), but an epoch's first."""
        start = index * self._context_length
        begin, stop, orders = self._here
        if not begin <= start < stop:
            begin, stop, orders = self._here = self._around(start)
        return self._read(orders, start - begin, self._size)

    def _around(self, token: int) -> tuple[int, int, list[Order]]:
        """(begin, stop, orders): blocks that begin at a token of begin .. stop - 1, as one at
        `token` does, are read out of these orders, the first of which begins at `begin`; of more
        than one where blocks reach over an epoch's end."""
        epoch, start = self._epochs.find(token)
        orders = [self._epochs(epoch)]
        size = orders[0].num_tokens
        while size < start + self._size:
            orders.append(self._epochs(epoch + len(orders)))
            size += orders[-1].num_tokens
        begin = token - start
        return begin, begin + min(orders[0].num_tokens, size - self._context_length), orders


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
        retrieved: RetrievedConfig | None = None,
        cache: IndexCache | None = None,
    ) -> None:
        """Pack `documents`; `seed` is any tuple of integers >= 0, `pad` the padding's id.

        Raises:
            UsageError: no document fits.
        """
        self._block_size = context_length + 1
        self._epochs = Epochs(
            documents, seed, retrieved=retrieved, cache=cache, longest=self._block_size
        )
        num_left_out = documents.num_documents - len(self._epochs(0))
        if num_left_out == documents.num_documents:
            raise UsageError(
                f"{documents.prefix}: every document is longer than context_length "
                f"{context_length}: raise it or set data.packing=stream"
            )
        if num_left_out:
            logger.warning(
                "%s: %d of %d documents are longer than context_length %d and are left out",
                *(documents.prefix, num_left_out, documents.num_documents, context_length),
            )
        self._read = Reader(
            Block,
            documents.all_tokens,
            documents.starts,
            self._epochs.retrieval,
            size=self._block_size,
            pad=pad,
        ).read
        self._starts = _Latest(self._pack)
        self._blocks = _Running(lambda epoch: len(self._starts(epoch)) - 1)
        self.epoch_size = float(len(self._starts(0)) - 1)
        self.epoch_tokens = self._epochs(0).num_tokens

    def block(self, index: int) -> Block:
        """Block `index`. O(log epochs), but an epoch's first."""
        epoch, number = self._blocks.find(index)
        starts = self._starts(epoch)
        start, stop = int(starts[number]), int(starts[number + 1])
        return self._read([self._epochs(epoch)], start, stop - start)

    def _pack(self, epoch: int) -> NDArray[np.int64]:
        """Where in the epoch's tokens each block starts, and the end, [blocks + 1]."""
        return pack_greedily(self._epochs(epoch).ends, self._block_size)


class Epochs:
    """The order of a set's documents, and what is laid out in front of them, in each epoch."""

    def __init__(
        self,
        documents: IndexedSet,
        seed: tuple[int, ...],
        *,
        retrieved: RetrievedConfig | None = None,
        cache: IndexCache | None = None,
        longest: int | None = None,
    ) -> None:
        """Draw from `seed`; leave out documents of more than `longest` tokens.

        Raises:
            UsageError: there are too many documents, or `retrieved` ones are wanted of none.
        """
        if documents.num_documents > np.iinfo(np.uint32).max:
            raise UsageError(f"{documents.prefix} has more than 2^32 documents: split it")
        self.retrieval = documents.retrieval(retrieved)
        """How retrieved documents are drawn; None if documents stay as they are."""
        self._documents = documents
        self._seed = seed
        self._longest = longest
        self._cache = cache or IndexCache(None)
        self._inputs = self._cache.digest(*documents.layout()), retrieved, longest
        self._latest = _Latest(self._order)
        self._lengths = _Latest(self._drawn_lengths, num_kept=2)
        self._running = _Running(self.num_tokens)

    def __call__(self, epoch: int) -> Order:
        """The order of `epoch`, which its first call makes."""
        return self._latest(epoch)

    def num_tokens(self, epoch: int) -> int:
        """Tokens of all documents in `epoch`, without making its order."""
        return int(self._lengths(epoch).sum(dtype=np.int64))

    def find(self, token: int) -> tuple[int, int]:
        """In which epoch a token of all documents' endless stream is, and at which place of it."""
        if self.retrieval is None:
            return divmod(token, self._documents.num_tokens)
        return self._running.find(token)

    def _drawn_lengths(self, epoch: int) -> NDArray[np.integer]:
        if self.retrieval is None:
            return self._documents.lengths
        return self.retrieval.lengths(self._draws(epoch))

    def _draws(self, epoch: int) -> int:
        return sample_key((*self._seed, epoch))

    def _order(self, epoch: int) -> Order:
        key = ("order 2", *self._inputs, self._seed, epoch)
        arrays = self._cache.arrays(key, ("numbers", "ends"), lambda: self._shuffle(epoch))
        return Order(*arrays, self._draws(epoch))

    def _shuffle(self, epoch: int) -> Sequence[NDArray]:
        lengths = self._lengths(epoch)
        if self._longest is None or lengths.max(initial=0) <= self._longest:
            order = shuffled(len(lengths), seed=self._seed, epoch=epoch)
        else:
            fitting = np.flatnonzero(lengths <= self._longest)
            order = fitting[shuffled(len(fitting), seed=self._seed, epoch=epoch)]
        return order.astype(np.uint32), np.cumsum(lengths[order], dtype=np.int64)


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
        found = self._results.get(epoch)  # without the lock, as mostly it is there
        return self._make(epoch) if found is None else found

    def _make(self, epoch: int) -> T:
        with self._lock:
            if epoch not in self._results:
                self._results[epoch] = self._function(epoch)
                if len(self._results) > self._num_kept:
                    del self._results[next(iter(self._results))]
            return self._results[epoch]


class _Running:
    """Places in a row of epochs that differ in size."""

    def __init__(self, size: Callable[[int], int]) -> None:
        self._size = size
        self._ends: list[int] = []  # of each epoch up to the last that was asked for
        self._lock = Lock()

    def find(self, place: int) -> tuple[int, int]:
        """The epoch, and the place in it."""
        with self._lock:
            while not self._ends or self._ends[-1] <= place:
                self._ends.append(sum(self._ends[-1:]) + self._size(len(self._ends)))
        epoch = bisect_right(self._ends, place)
        return epoch, place - (self._ends[epoch - 1] if epoch else 0)
