"""Perplexity of a model on prepared sets: no masking, no shuffling, every token once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.data.evaluation import evaluation_samples
from megatron_jam.data.indexed import read_info
from megatron_jam.data.loader import collate
from megatron_jam.data.sample import Sample
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.world import World
from megatron_jam.training.losses import Losses
from megatron_jam.training.step import Batch, ForwardBackward
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import load_weights

MICRO_BATCHES_OF_A_ROUND = 16


def measure_sets(
    step: ForwardBackward,
    sets: Sequence[DataSetConfig],
    folder: WeightsFolder,
    world: World,
    *,
    context_length: int,
    micro_batch_size: int,
    isolate_documents: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> Mapping[str, Losses]:
    """Losses of each set by name, the same under every layout; all ranks take part.

    A set is cut into consecutive contexts of whole documents where they fit, each read without
    what stands before it. All tokens count, in questions too.

    Args:
        step: the model.
        sets: prepared sets.
        folder: what the model was loaded from; its vocabulary and tokenizer made the sets.
        world: the ranks.
        context_length: tokens read at once.
        micro_batch_size: contexts computed at once on each replica.
        isolate_documents: read each document by itself, as data.isolate_documents in training.
        poll: called after every few micro-batches, on all ranks; what it raises ends the measuring.

    Raises:
        UsageError: if a set is missing, too small, or made with another vocabulary or tokenizer.
    """
    measured = {}
    for each in sets:
        folder.require_tokenizer(read_info(each.path).tokenizer_sha256, each.path)
        samples = evaluation_samples(
            each.path,
            folder.vocabulary,
            context_length=context_length,
            retrieved=each.retrieved,
        )
        if not len(samples):
            raise UsageError(f"{each.path} has less than two tokens: there is nothing to measure")
        rounds = []
        for batches in _rounds(samples, world, micro_batch_size, isolate_documents):
            with torch.no_grad():
                rounds.append(step(batches, forward_only=True))
            poll()
        measured[each.name] = Losses.total(rounds)
    return measured


def measure_folder(
    path: Path,
    sets: Sequence[DataSetConfig],
    world: World,
    *,
    context_length: int,
    micro_batch_size: int,
    isolate_documents: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Mapping[str, Losses]:
    """Losses of a weights folder on each set; all ranks take part."""
    for name, value in (("context_length", context_length), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    folder = WeightsFolder(path)
    if context_length > folder.config.max_positions:
        raise UsageError(
            f"context_length {context_length} is longer than max_positions"
            f" {folder.config.max_positions} of {path}"
        )
    world.parallel.check_length(context_length)
    chunks = [
        JamModel(folder.config, world, dtype=dtype, chunk=i)
        for i in range(world.parallel.interleave)
    ]
    load_weights(chunks, folder, world)
    step = ForwardBackward(chunks, world, folder.vocabulary)
    return measure_sets(
        step,
        sets,
        folder,
        world,
        context_length=context_length,
        micro_batch_size=micro_batch_size,
        isolate_documents=isolate_documents,
    )


def _rounds(
    samples: Sequence[Sample], world: World, micro_batch_size: int, isolate_documents: bool
) -> Iterator[list[Batch]]:
    """This replica's micro-batches, a few at a time so that a large set need not fit in memory.

    Each round has as many as there are stages, which the interleaved schedule wants; the replicas
    get equally many, filled up with samples that do not count.
    """
    size = max(MICRO_BATCHES_OF_A_ROUND // world.pipeline.size, 1) * world.pipeline.size
    at_once = micro_batch_size * world.data.size
    count = -(-len(samples) // at_once)
    for begin in range(0, count, size):
        end = begin + -(-min(size, count - begin) // world.pipeline.size) * world.pipeline.size
        starts = (n * at_once + world.data.rank * micro_batch_size for n in range(begin, end))
        yield [_batch(samples, start, micro_batch_size, isolate_documents) for start in starts]


def _batch(samples: Sequence[Sample], start: int, size: int, isolate_documents: bool) -> Batch:
    numbers = range(start, start + size)
    chosen = [samples[min(number, len(samples) - 1)] for number in numbers]
    batch = collate(chosen, isolate_documents=isolate_documents)
    batch["loss_mask"][[number >= len(samples) for number in numbers]] = 0
    return batch
