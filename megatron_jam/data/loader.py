"""From the configuration to collated batches; which rank reads which samples."""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from megatron_jam.config.data import DataConfig, DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.data.blend import Blend
from megatron_jam.data.cm3 import Cm3Dataset
from megatron_jam.data.index_cache import IndexCache
from megatron_jam.data.indexed import open_set, read_info
from megatron_jam.data.instruction import AnswerDataset
from megatron_jam.data.packing import DocumentPacking, StreamPacking
from megatron_jam.data.sample import CausalDataset, Dataset, Packing, Sample
from megatron_jam.tokenizers.vocabulary import JointVocabulary

# Each use of the seed gets numbers of its own.
_ORDER, _CM3 = 0, 1


def build_dataset(
    config: DataConfig,
    vocabulary: JointVocabulary,
    *,
    context_length: int,
    seed: int,
    index_cache: Path | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Blend:
    """The blend that `config` describes: samples of `context_length` tokens.

    Args:
        config: the sets.
        vocabulary: of their ids.
        context_length: tokens of a sample.
        seed: of orders and masks.
        index_cache: where orders of documents are kept, if anywhere.
        poll: called after each set; what it raises ends the building.

    Raises:
        UsageError: a set is missing, damaged or of another vocabulary, no document fits, or the
            sets' pictures are of different image tokenizers.
    """
    image_tokenizer_of(config)
    cache = IndexCache(index_cache)
    settings = {"context_length": context_length, "seed": seed, "cache": cache}
    datasets = []
    for each in config.sets:
        datasets.append(_build_set(each, config, vocabulary, **settings))
        poll()
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
    cache: IndexCache,
) -> Dataset:
    documents = open_set(each.path, vocabulary)
    key = (seed, zlib.crc32(each.name.encode()))
    packing: Packing
    if config.packing == "stream":
        packing = StreamPacking(
            documents,
            context_length=context_length,
            seed=(*key, _ORDER),
            retrieved=each.retrieved,
            cache=cache,
        )
    else:
        packing = DocumentPacking(
            documents,
            context_length=context_length,
            seed=(*key, _ORDER),
            pad=vocabulary.pad,
            retrieved=each.retrieved,
            cache=cache,
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


class GlobalBatches:
    """The micro-batches of this rank, step by step; the next step's are made in the background."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        isolate_documents: bool = False,
        workers: int = 1,
    ) -> None:
        """Read `dataset` in the order of :func:`global_batch_indices`, with `workers` threads."""
        self._dataset = dataset
        self.indices: Callable[[int], list[list[int]]] = partial(
            global_batch_indices,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )
        """The numbers of the samples in each micro-batch of a step."""
        self._isolate_documents = isolate_documents
        self._threads = ThreadPoolExecutor(workers, "samples") if workers else None
        self._ahead: dict[int, list[Future[_MicroBatch]]] = {}
        self.num_dropped = 0
        """Tokens that had to make room in the samples of this rank so far."""

    def __call__(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of `step`, any step; quickest in order."""
        if self._threads is None:
            made = [self._make(indices) for indices in self.indices(step)]
        else:
            started = self._ahead.pop(step, None) or self._start(step)
            self._ahead = {step + 1: self._start(step + 1)}
            made = [future.result() for future in started]
        self.num_dropped += sum(each.num_dropped for each in made)
        return [each.batch for each in made]

    def _start(self, step: int) -> list[Future["_MicroBatch"]]:
        assert self._threads is not None
        return [self._threads.submit(self._make, indices) for indices in self.indices(step)]

    def _make(self, indices: list[int]) -> "_MicroBatch":
        samples = [self._dataset.sample(index) for index in indices]
        batch = collate(samples, isolate_documents=self._isolate_documents)
        return _MicroBatch(batch, sum(each.dropped for each in samples))


class _MicroBatch(NamedTuple):
    batch: dict[str, torch.Tensor]
    num_dropped: int


def collate(
    samples: Sequence[Sample], *, isolate_documents: bool = False
) -> dict[str, torch.Tensor]:
    """A batch of samples of one length: tokens, labels int64, loss_mask float32, positions int64,
    and documents int64 if they are isolated, each [batch, context_length]; sets int64 [batch], the
    numbers of their data sets.

    Isolated, a document's tokens count their own positions, and its first is not predicted.
    """
    blocks = _stack([each.block.tokens for each in samples])
    tokens = blocks[:, :-1].long()
    batch = {
        "tokens": tokens,
        "labels": blocks[:, 1:].long(),
        "loss_mask": _stack([each.loss_mask for each in samples], np.float32),
        "positions": torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(),
        "sets": torch.tensor([each.dataset for each in samples]),
    }
    if isolate_documents:
        documents = _stack([each.documents for each in samples]).long()
        inputs, predicted = documents[:, :-1], documents[:, 1:]
        batch["positions"] = positions_within(inputs)
        batch["documents"] = inputs.contiguous()
        # Nothing of a document predicts the next one.
        batch["loss_mask"] *= inputs == predicted
    return batch


def _stack(rows: list[NDArray], dtype: DTypeLike = None) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows, dtype=dtype))


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
