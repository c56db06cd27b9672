"""What a model is given: samples, and what makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """One row of a batch."""

    tokens: NDArray[np.int64]
    """What the model reads, [context_length]."""

    labels: NDArray[np.int64]
    """labels[i] is the token after tokens[i], [context_length]."""

    loss_mask: NDArray[np.bool_]
    """Whether labels[i] counts in the loss, [context_length]."""

    documents: NDArray[np.int64]
    """Equal for the tokens of one document; the last label's as well, [context_length + 1]."""


@dataclass(frozen=True)
class Block:
    """Documents in a row, or parts of them, before they become a sample."""

    tokens: NDArray[np.int64]
    """[context_length + 1]."""

    documents: NDArray[np.int64]
    """Which of the block's documents each token is of, counted from 0, [context_length + 1];
    padding is one more."""

    @classmethod
    def of(cls, documents: Sequence[NDArray[np.int64]], *, size: int, pad: int) -> "Block":
        """The documents in a row, then `pad` up to `size` tokens."""
        lengths = [len(each) for each in documents]
        padding = size - sum(lengths)
        return cls(
            tokens=np.concatenate([*documents, np.full(padding, pad, dtype=np.int64)]),
            documents=np.repeat(np.arange(len(lengths) + 1), [*lengths, padding]),
        )


class Dataset(Protocol):
    """Samples without end."""

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0: a pure function of the data set's seed and the index."""
        ...


class Packing(Protocol):
    """Documents cut or gathered into blocks, without end."""

    def block(self, index: int) -> Block:
        """Block `index` >= 0."""
        ...


def sample_from_block(
    block: Block, *, pad: int, counted: NDArray[np.bool_] | None = None
) -> Sample:
    """The sample that reads all tokens of `block` but the last and predicts all but the first.

    Args:
        block: what to read.
        pad: the id that never counts.
        counted: which tokens of the block count as labels, [context_length + 1]; default all.
    """
    labels = block.tokens[1:]
    loss_mask = labels != pad
    if counted is not None:
        loss_mask &= counted[1:]
    return Sample(
        tokens=block.tokens[:-1],
        labels=labels,
        loss_mask=loss_mask,
        documents=block.documents,
    )


class CausalDataset:
    """Blocks as they are; every token but padding counts."""

    def __init__(self, packing: Packing, *, pad: int) -> None:
        """Read `packing`; `pad` is the padding's id."""
        self._packing = packing
        self._pad = pad

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        return sample_from_block(self._packing.block(index), pad=self._pad)
