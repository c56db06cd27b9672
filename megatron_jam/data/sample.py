"""What a model is given: samples, and what makes them. Ids are int32 until they become a batch."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_jam.ops.extension import differ


class Sample(NamedTuple):
    """One row of a batch."""

    tokens: NDArray[np.int32]
    """What the model reads, [context_length]."""

    labels: NDArray[np.int32]
    """labels[i] is the token after tokens[i], [context_length]."""

    loss_mask: NDArray[np.bool_]
    """Whether labels[i] counts in the loss, [context_length]."""

    documents: NDArray[np.int32]
    """Equal for the tokens of one document; the last label's as well, [context_length + 1]."""

    dropped: int = 0
    """Tokens of the data that the sample should hold and has no room for."""

    index: int = 0
    """The sample's number in what it was asked of: in a run, the run's global index."""

    dataset: int = 0
    """The number of its data set in the blend."""


class Block(NamedTuple):
    """Documents in a row, or parts of them, before they become a sample."""

    tokens: NDArray[np.int32]
    """[context_length + 1]."""

    documents: NDArray[np.int32]
    """Which of the block's documents each token is of, counted from 0, [context_length + 1];
    padding is one more."""

    dropped: int = 0
    """Tokens that were cut off to make room for others."""


class Dataset(Protocol):
    """Samples without end."""

    epoch_size: float
    """Samples in an epoch, the first if they differ."""

    epoch_tokens: int
    """Tokens in the same, without padding."""

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0: a pure function of the data set's seed and the index."""
        ...


class Packing(Protocol):
    """Documents cut or gathered into blocks, without end."""

    epoch_size: float
    """Blocks in an epoch, the first if they differ."""

    epoch_tokens: int
    """Tokens in the same, without padding."""

    def block(self, index: int) -> Block:
        """Block `index` >= 0."""
        ...


def sample_from_block(
    block: Block, index: int = 0, *, pad: int, counted: NDArray[np.bool_] | None = None
) -> Sample:
    """The sample that reads all tokens of `block` but the last and predicts all but the first.

    Args:
        block: what to read.
        index: the sample's number.
        pad: the id that never counts.
        counted: which tokens of the block count as labels, [context_length + 1]; default all.
    """
    labels = block.tokens[1:]
    loss_mask = differ(labels, pad)
    if counted is not None:
        loss_mask &= counted[1:]
    return Sample(block.tokens[:-1], labels, loss_mask, block.documents, block.dropped, index)


def sample_key(seed: tuple[int, ...]) -> int:
    """A tuple of integers >= 0 as one of 63 bits, for generators that are keyed by a number."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))


class CausalDataset:
    """Blocks as they are; every token but padding counts."""

    def __init__(self, packing: Packing, *, pad: int) -> None:
        """Read `packing`; `pad` is the padding's id."""
        self._packing = packing
        self._pad = pad
        self.epoch_size = packing.epoch_size
        self.epoch_tokens = packing.epoch_tokens

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        return sample_from_block(self._packing.block(index), index, pad=self._pad)
