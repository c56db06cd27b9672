"""What a model is given: samples, and what makes them. Ids are int32 until they become a batch."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Block(NamedTuple):
    """Documents in a row, or parts of them."""

    tokens: NDArray[np.int32]
    """[context_length + 1]."""

    runs: NDArray[np.int32]
    """(document, stop), [runs, 2]: the tokens from the run before up to `stop` are of `document`,
    counted from 0 in the block; padding is one more. Neighbours differ, the last stop is the
    block's size."""

    dropped: int = 0
    """Tokens that were cut off to make room for others."""

    @classmethod
    def of(cls, tokens: NDArray[np.int32], documents: NDArray[np.int32]) -> "Block":
        """The block of tokens whose documents are given token by token, both int32 [size]."""
        borders = np.flatnonzero(np.diff(documents)) + 1
        stops = np.append(borders, documents.size) if documents.size else borders
        return cls(tokens, np.stack([documents[stops - 1], stops], axis=1).astype(np.int32))

    @property
    def documents(self) -> NDArray[np.int32]:
        """Which document each token is of, [context_length + 1]; made anew at each call."""
        return np.repeat(self.runs[:, 0], np.diff(self.runs[:, 1], prepend=0))


class Sample(NamedTuple):
    """One row of a batch. The model reads all tokens of a block but the last and predicts all but
    the first."""

    block: Block
    """The tokens and their documents."""

    pad: int
    """The id that never counts in the loss."""

    index: int = 0
    """The sample's number in what it was asked of: in a run, the run's global index."""

    dataset: int = 0
    """The number of its data set in the blend."""

    counted: NDArray[np.bool_] | None = None
    """Which of the block's tokens count where they are predicted, [context_length + 1]; None: all
    but padding."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """What the model reads, [context_length]."""
        return self.block.tokens[:-1]

    @property
    def labels(self) -> NDArray[np.int32]:
        """labels[i] is the token after tokens[i], [context_length]."""
        return self.block.tokens[1:]

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """Whether labels[i] counts in the loss, [context_length]; made anew at each call."""
        mask = self.labels != self.pad
        return mask if self.counted is None else mask & self.counted[1:]

    @property
    def documents(self) -> NDArray[np.int32]:
        """Equal for the tokens of one document; the last label's as well, [context_length + 1];
        made anew at each call."""
        return self.block.documents

    @property
    def dropped(self) -> int:
        """Tokens of the data that the sample should hold and has no room for."""
        return self.block.dropped


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
        return Sample(self._packing.block(index), self._pad, index)
