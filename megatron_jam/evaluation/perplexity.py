"""Perplexity of a model on prepared sets: no masking, no shuffling, every token once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.data.loader import collate, evaluation_samples
from megatron_jam.data.sample import Sample
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.step import Batch, ForwardBackward, Losses
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import load_weights


def measure_sets(
    step: ForwardBackward,
    sets: Sequence[DataSetConfig],
    vocabulary: JointVocabulary,
    world: World,
    *,
    context_length: int,
    micro_batch_size: int,
) -> Mapping[str, Losses]:
    """Losses of each set by name, the same under every layout; all ranks take part.

    A set is cut into consecutive contexts, each read without what stands before it.
    """
    measured = {}
    for each in sets:
        samples = evaluation_samples(each.path, vocabulary, context_length=context_length)
        if not len(samples):
            raise UsageError(f"{each.path} has less than two tokens: there is nothing to measure")
        batches = _batches(samples, world, micro_batch_size)
        with torch.no_grad():
            measured[each.name] = step(batches, forward_only=True)
    return measured


def measure_folder(
    path: Path,
    sets: Sequence[DataSetConfig],
    world: World,
    *,
    context_length: int,
    micro_batch_size: int,
) -> Mapping[str, Losses]:
    """Losses of a weights folder on each set; all ranks take part."""
    folder = WeightsFolder(path)
    if context_length > folder.config.max_positions:
        raise UsageError(
            f"context_length {context_length} is longer than max_positions"
            f" {folder.config.max_positions} of {path}"
        )
    world.parallel.check_length(context_length)
    chunks = [JamModel(folder.config, world, chunk=i) for i in range(world.parallel.interleave)]
    load_weights(chunks, folder, world)
    step = ForwardBackward(chunks, world, folder.vocabulary)
    return measure_sets(
        step,
        sets,
        folder.vocabulary,
        world,
        context_length=context_length,
        micro_batch_size=micro_batch_size,
    )


def _batches(samples: Sequence[Sample], world: World, micro_batch_size: int) -> list[Batch]:
    """This replica's micro-batches; the replicas get equally many, filled up with nothing."""
    at_once = micro_batch_size * world.data.size
    batches = []
    for start in range(0, len(samples), at_once):
        first = start + world.data.rank * micro_batch_size
        numbers = range(first, first + micro_batch_size)
        chosen = [samples[min(n, len(samples) - 1)] for n in numbers]
        batch = collate(chosen)
        for row, number in enumerate(numbers):
            if number >= len(samples):
                batch["loss_mask"][row] = 0
        batches.append(batch)
    # The interleaved schedule wants a multiple of the stages.
    while len(batches) % world.pipeline.size:
        batches.append({**batches[-1], "loss_mask": torch.zeros_like(batches[-1]["loss_mask"])})
    return batches
