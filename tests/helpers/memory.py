"""The memory that a training step takes on a CPU, by the profiler's record of the allocator."""

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_jam.config.model import ModelConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.optimizer import wrap_chunks
from megatron_jam.training.step import ForwardBackward
from tests.helpers.runs import random_batch


def peak_of_step(
    world: World,
    config: ModelConfig,
    dtype: torch.dtype,
    recompute: str,
    shape: tuple[int, int],
    num_micro_batches: int = 1,
) -> int:
    """Bytes at the peak of forward and backward passes, weights and summed gradients left out, and
    what an operator works in.

    Args:
        world: the ranks.
        config: a model whose vocabulary has 16 image codes and 4 sentinels.
        dtype: of weights and activations.
        recompute: none, selective or full.
        shape: samples of a micro-batch, and tokens of each.
        num_micro_batches: of this rank.
    """
    chunks = [
        JamModel(config, world, dtype=dtype, recompute=recompute, chunk=i)
        for i in range(world.parallel.interleave)
    ]
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.normal_(0, 0.02)
    vocabulary = vocabulary_of(config)
    wrapped = wrap_chunks(chunks, world, distributed_optimizer=False)
    step = ForwardBackward(wrapped, world, vocabulary)
    samples, length = shape
    batch = random_batch(config.vocab_size, samples=samples, length=length)
    step([batch] * num_micro_batches)  # what is made once and kept is there now
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step([batch] * num_micro_batches)
    roots = record.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    events = sorted(
        (node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, operator)
        for operator, node in _nodes(roots)
        if node.name == "[memory]"
    )
    return _most_at_once(_without_scratch([event[1:] for event in events]))


def _without_scratch(events: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(address, bytes) of the (address, bytes, number of the operator), less what one operator took
    and gave back by itself: matrix products in bf16 do, on processors without instructions."""
    taken: dict[int, int] = {}
    scratch: set[int] = set()
    for number, (place, size, operator) in enumerate(events):
        if size > 0:
            taken[place] = number
        elif (start := taken.pop(place, None)) is not None and events[start][2] == operator:
            scratch |= {start, number}
    return [(place, size) for n, (place, size, _) in enumerate(events) if n not in scratch]


def _most_at_once(events: list[tuple[int, int]]) -> int:
    """Most bytes held, from (address, bytes) of each allocation and, negative, of each release.

    The allocator's own count runs on with what a thread that the profiler does not see releases, as
    gloo's do; an address that is given out again was released.
    """
    live: dict[int, int] = {}
    total = most = 0
    for place, size in events:
        total -= live.pop(place, 0)
        if size > 0:
            live[place] = size
            total += size
        most = max(most, total)
    return most


def vocabulary_of(config: ModelConfig) -> JointVocabulary:
    """A vocabulary of the size that `config` says."""
    small = JointVocabulary.build(text_size=300, num_image_codes=16, num_sentinels=4)
    text_size = 300 + config.vocab_size - small.size
    return JointVocabulary.build(text_size=text_size, num_image_codes=16, num_sentinels=4)


def _nodes(roots: list[Any]) -> Iterator[tuple[int, Any]]:
    """All nodes, each with its parent's number; what has no parent has a number of its own."""
    numbers = itertools.count()
    waiting = [(next(numbers), root) for root in roots]
    while waiting:
        parent, node = waiting.pop()
        yield parent, node
        number = next(numbers)
        waiting += [(number, child) for child in node.children]
