"""What a model is given: samples, and what makes them."""

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


class Dataset(Protocol):
    """Samples without end."""

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0: a pure function of the data set's seed and the index."""
        ...


class Packing(Protocol):
    """Documents cut or gathered into blocks, without end."""

    def block(self, index: int) -> NDArray[np.int64]:
        """Block `index` >= 0, [context_length + 1]."""
        ...


def sample_from_block(
    block: NDArray[np.int64], *, pad: int, counted: NDArray[np.bool_] | None = None
) -> Sample:
    """The sample that reads block[:-1] and predicts block[1:].

    Args:
        block: tokens, [context_length + 1].
        pad: the id that never counts.
        counted: which tokens of the block count as labels, [context_length + 1]; default all.
    """
    labels = block[1:]
    loss_mask = labels != pad
    if counted is not None:
        loss_mask &= counted[1:]
    return Sample(tokens=block[:-1], labels=labels, loss_mask=loss_mask)


class CausalDataset:
    """Blocks as they are; every token but padding counts."""

    def __init__(self, packing: Packing, *, pad: int) -> None:
        """Read `packing`; `pad` is the padding's id."""
        self._packing = packing
        self._pad = pad

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        return sample_from_block(self._packing.block(index), pad=self._pad)
