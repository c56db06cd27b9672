"""From the configuration to collated batches; which rank reads which samples."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_jam.config.data import DataConfig, DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.data.blend import Blend
from megatron_jam.data.cm3 import Cm3Dataset
from megatron_jam.data.indexed import IndexedSet, open_set, read_info
from megatron_jam.data.instruction import AnswerDataset
from megatron_jam.data.packing import DocumentPacking, StreamPacking
from megatron_jam.data.sample import (
    Block,
    CausalDataset,
    Dataset,
    Packing,
    Sample,
    sample_from_block,
)
from megatron_jam.tokenizers.vocabulary import JointVocabulary

# Each use of the seed gets numbers of its own.
_ORDER, _CM3 = 0, 1


def build_dataset(
    config: DataConfig, vocabulary: JointVocabulary, *, context_length: int, seed: int
) -> Blend:
    """The blend that `config` describes: samples of `context_length` tokens.

    Raises:
        UsageError: a set is missing, damaged or of another vocabulary, no document fits, or the
            sets' pictures are of different image tokenizers.
    """
    image_tokenizer_of(config)
    datasets = [
        _build_set(each, config, vocabulary, context_length=context_length, seed=seed)
        for each in config.sets
    ]
    return Blend(datasets, [each.weight for each in config.sets])


def image_tokenizer_of(config: DataConfig) -> str:
    """`ImageTokenizer.sha256` of all pictures in the sets; empty if no set has any.

    Raises:
        UsageError: two sets, which are named, are of different image tokenizers, whose codes of
            one number are different pictures; or a set is missing or damaged.
    """
    first, known = "", ""
    for each in config.sets:
        sha256 = read_info(each.path).image_tokenizer_sha256
        if sha256 and known and sha256 != known:
            raise UsageError(
                f"data.sets: the pictures of {first} and {each.path} were made with different image"
                f" tokenizers ({known[:12]}, {sha256[:12]}): prepare both with one"
            )
        if sha256:
            first, known = each.path, sha256
    return known


def _build_set(
    each: DataSetConfig,
    config: DataConfig,
    vocabulary: JointVocabulary,
    *,
    context_length: int,
    seed: int,
) -> Dataset:
    documents = open_set(each.path, vocabulary)
    key = (seed, zlib.crc32(each.name.encode()))
    packing: Packing
    if config.packing == "stream":
        packing = StreamPacking(documents, context_length=context_length, seed=(*key, _ORDER))
    else:
        packing = DocumentPacking(
            documents, context_length=context_length, seed=(*key, _ORDER), pad=vocabulary.pad
        )
    if config.objective == "cm3":
        return Cm3Dataset(packing, vocabulary=vocabulary, config=config.cm3, seed=(*key, _CM3))
    if config.loss_on == "answers" and documents.info.kind == "interleaved":
        return AnswerDataset(packing, vocabulary=vocabulary)
    return CausalDataset(packing, pad=vocabulary.pad)


def global_batch_indices(
    step: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> list[list[int]]:
    """The sample indices of each micro-batch of one rank in training step `step` >= 0.

    Step s reads samples [s * global_batch_size, (s + 1) * global_batch_size), whatever the number
    of ranks and the size of micro-batches; the ranks' first micro-batches hold the first of them.

    Raises:
        UsageError: global_batch_size does not divide into the ranks' micro-batches.
    """
    stride = micro_batch_size * data_parallel_size
    if global_batch_size % stride:
        raise UsageError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size "
            f"{micro_batch_size} x data-parallel size {data_parallel_size}"
        )
    first = step * global_batch_size + data_parallel_rank * micro_batch_size
    return [
        list(range(start, start + micro_batch_size))
        for start in range(first, first + global_batch_size, stride)
    ]


def collate(
    samples: Sequence[Sample], *, isolate_documents: bool = False
) -> dict[str, torch.Tensor]:
    """A batch of samples of one length: tokens, labels int64, loss_mask float32, positions int64,
    and documents int64 if they are isolated, each [batch, context_length].

    Isolated, a document's tokens count their own positions, and its first is not predicted.
    """
    tokens, labels, documents = (
        torch.from_numpy(np.stack([getattr(each, name) for each in samples]))
        for name in ("tokens", "labels", "documents")
    )
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.from_numpy(np.stack([each.loss_mask for each in samples])).float(),
        "positions": torch.arange(tokens.shape[1]).repeat(len(samples), 1),
    }
    if isolate_documents:
        inputs, predicted = documents[:, :-1], documents[:, 1:]
        batch["positions"] = positions_within(inputs)
        batch["documents"] = inputs.contiguous()
        # Nothing of a document predicts the next one.
        batch["loss_mask"] *= inputs == predicted
    return batch


def positions_within(documents: torch.Tensor) -> torch.Tensor:
    """How many tokens of its document stand before each token, int64 [B, S] -> [B, S].

    A document's tokens need not stand together: CM3 moves some to the sample's end.
    """
    order = documents.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order)
    places = torch.arange(documents.shape[1]).expand_as(order)
    ranks.scatter_(1, order, places)  # each token's place among all, sorted by document
    in_order = documents.gather(1, order)
    begins = torch.searchsorted(in_order.contiguous(), documents.contiguous())
    return ranks - begins


class EvaluationSamples(Sequence[Sample]):
    """A set from its first token to its last, in the order of the file: every token but the first
    is predicted exactly once. A context ends with a document wherever one ends within its reach,
    so that documents are read whole; it begins with the last token of the context before."""

    def __init__(self, documents: IndexedSet, *, context_length: int, pad: int) -> None:
        """Use :func:`evaluation_samples`."""
        self._documents = documents
        self._context_length = context_length
        self._pad = pad
        self._ends = np.cumsum(documents.lengths, dtype=np.int64) - 1
        self._cuts = _evaluation_cuts(self._ends, context_length)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._cuts) - 1

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """Sample `index`, from 0; IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, last = self._cuts[index], self._cuts[index + 1]
        tokens = self._documents.tokens(first, last + 1)
        inner = slice(*np.searchsorted(self._ends, [first, last]))
        pieces = np.split(tokens, self._ends[inner] + 1 - first)
        block = Block.of(pieces, size=self._context_length + 1, pad=self._pad)
        return sample_from_block(block, pad=self._pad)


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
    prefix: str, vocabulary: JointVocabulary, *, context_length: int
) -> EvaluationSamples:
    """All samples of the set PREFIX, neither shuffled nor masked, always the same.

    Raises:
        UsageError: the set is missing, damaged, or of another vocabulary.
    """
    documents = open_set(prefix, vocabulary)
    return EvaluationSamples(documents, context_length=context_length, pad=vocabulary.pad)
