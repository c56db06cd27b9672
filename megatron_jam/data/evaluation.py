"""Samples to measure a model with: a set from its first token to its last, always the same."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.data import RetrievedConfig
from megatron_jam.data.indexed import IndexedSet, open_set
from megatron_jam.data.sample import Block, Sample
from megatron_jam.ops.extension import Order, Reader
from megatron_jam.tokenizers.vocabulary import JointVocabulary

_DRAWS = 0  # of retrieved documents, in all measurements


class EvaluationSamples(Sequence[Sample]):
    """A set from its first token to its last, in the order of the file: every token but the first
    is predicted exactly once. A context ends with a document wherever one ends within its reach,
    so that documents are read whole; it begins with the last token of the context before."""

    def __init__(
        self,
        documents: IndexedSet,
        *,
        context_length: int,
        pad: int,
        retrieved: RetrievedConfig | None = None,
    ) -> None:
        """Use :func:`evaluation_samples`."""
        retrieval = documents.retrieval(retrieved)
        lengths = documents.lengths if retrieval is None else retrieval.lengths(_DRAWS)
        ends = np.cumsum(lengths, dtype=np.int64)
        self._pad = pad
        self._order = Order(np.arange(documents.num_documents, dtype=np.uint32), ends, _DRAWS)
        self._cuts = _evaluation_cuts(ends - 1, context_length)
        self._read = Reader(
            Block,
            documents.all_tokens,
            documents.starts,
            retrieval,
            size=context_length + 1,
            pad=pad,
        ).read

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._cuts) - 1

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """Sample `index`, from 0; IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, last = self._cuts[index], self._cuts[index + 1]
        block = self._read([self._order], first, last + 1 - first)
        return Sample(block, self._pad, index)


def _evaluation_cuts(ends: NDArray[np.int64], context_length: int) -> list[int]:
    """Context i reads the tokens from cut i on and predicts those up to and with cut i + 1.

    `ends` are the places of the documents' last tokens.
    """
    cuts, last = [0], int(ends[-1]) if len(ends) else -1
    while cuts[-1] < last:
        reach = cuts[-1] + context_length
        number = int(np.searchsorted(ends, reach, side="right")) - 1
        whole = int(ends[number]) if number >= 0 else 0
        cuts.append(whole if whole > cuts[-1] else min(reach, last))
    return cuts


def evaluation_samples(
    prefix: str,
    vocabulary: JointVocabulary,
    *,
    context_length: int,
    retrieved: RetrievedConfig | None = None,
) -> EvaluationSamples:
    """All samples of the set PREFIX, neither shuffled nor masked, always the same, with the same
    `retrieved` pairs in front.

    Raises:
        UsageError: the set is missing, damaged, of another vocabulary, or has nothing retrieved.
    """
    documents = open_set(prefix, vocabulary)
    return EvaluationSamples(
        documents, context_length=context_length, pad=vocabulary.pad, retrieved=retrieved
    )
