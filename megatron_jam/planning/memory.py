"""Memory of each pipeline stage of a run: weights, gradients, optimizer and activations, in bytes.

A plan, not a measurement: it knows no allocator's gaps, no buffers of communication libraries and
no fused kernels, and its activations are those of the `torch` backend on a CPU, without masks of
dropout and of isolated documents.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_jam.config.deepspeed import DeepSpeedConfig
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import check_layout
from megatron_jam.models.parameters import (
    Parameter,
    learns,
    padded_vocabulary,
    parameter_table,
)
from megatron_jam.models.stages import stage_layers
from megatron_jam.planning.activations import GENERATOR, Recompute, joint_layer
from megatron_jam.planning.head import head_steps, loss
from megatron_jam.planning.steps import FP32, Sizes, Step, backward_peak, kept

Precision = Literal["fp32", "bf16"]
WIDTHS: dict[Precision, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes on a rank that stay from step to step."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0
    """In the host's memory, if the device is another; no part of the total."""

    @property
    def total(self) -> int:
        """All on the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch's activations in one chunk of layers."""

    kept: int
    """From its forward to its backward pass."""

    peak: int
    """At most during the two, what is kept included."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What each rank of a pipeline stage holds; all tensor-parallel ranks hold as much."""

    stage: int
    """Counted from 0."""

    layers: list[int]
    """Numbers of its layers."""

    bridges: int
    """Bridges in one direction."""

    parameters: int
    """Weights of the stage without padding; a tied table's copy counts where it is used first, so
    that the stages add up to the model."""

    rank_parameters: int
    """Weights of one of its ranks, with padding and copies."""

    micro_batches: int
    """Forward passes, of its chunks together, that wait for their backward at once."""

    state: State
    """Weights, gradients, optimizer."""

    activations: dict[Recompute, int]
    """Of all micro-batches in flight at their peak, under each recomputation."""


def state_bytes(
    num_parameters: int,
    *,
    width: int,
    replicas: int,
    num_frozen: int = 0,
    distributed_optimizer: bool = True,
    zero: DeepSpeedConfig | None = None,
) -> State:
    """What weights take on a rank, with what learns them.

    Gradients are summed in fp32. Adam has two fp32 moments and, for weights narrower than fp32, an
    fp32 copy; a distributed optimizer splits these over the replicas.

    Args:
        num_parameters: weights on the rank.
        width: bytes of a weight.
        replicas: ranks with the same weights.
        num_frozen: how many of the weights do not learn.
        distributed_optimizer: whether they share the optimizer's state.
        zero: of `engine: deepspeed`: what else they share, whether the host has the optimizer.
            It keeps an fp32 copy of fp32 weights as well; and on the host, with the optimizer,
            gradients twice (to sum them, to step by them) and in stage 2 new weights on their way.
    """
    num_learning = num_parameters - num_frozen
    if zero is not None:
        share = -(-num_learning // replicas)
        weights = num_parameters * width
        if zero.stage == 3:
            weights = -(-weights // replicas)
        if zero.offload_optimizer:
            outgoing = width if zero.stage == 2 else 0
            host = share * (FP32 * 5 + outgoing)
            return State(weights=weights, gradients=0, optimizer=0, host=host)
        return State(weights=weights, gradients=share * FP32, optimizer=share * FP32 * 3)
    optimizer = num_learning * FP32 * (3 if width < FP32 else 2)
    return State(
        weights=num_parameters * width,
        gradients=num_learning * max(width, FP32),
        optimizer=-(-optimizer // replicas) if distributed_optimizer else optimizer,
    )


def plan(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    replicas: int,
    micro_batch_size: int,
    num_micro_batches: int,
    context_length: int,
    precision: Precision,
    frozen: Collection[str] = (),
    distributed_optimizer: bool = True,
    zero: DeepSpeedConfig | None = None,
) -> list[StageMemory]:
    """Memory of every pipeline stage.

    Args:
        model: towers, bridges, head.
        parallel: layout.
        replicas: data-parallel replicas.
        micro_batch_size: samples of a micro-batch.
        num_micro_batches: micro-batches of a rank in a step.
        context_length: tokens of a sample.
        precision: of weights and activations.
        frozen: towers whose parent's weights do not learn; activations are planned as if they did.
        distributed_optimizer: whether replicas share the optimizer's state, as in training.
        zero: settings of `engine: deepspeed`, if that is the engine.

    Raises:
        UsageError: if the model or its sequences cannot be split so; the message names the setting.
    """
    check_layout(model, parallel)
    parallel.check_length(context_length)
    parallel.check_micro_batches(num_micro_batches)
    sizes = Sizes(
        tokens=micro_batch_size * context_length // parallel.context,
        width=WIDTHS[precision],
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        main_gradients=zero is None,
    )
    layout = (model, parallel)
    stages = []
    for stage in range(parallel.pipeline):
        state = state_bytes(
            rank_parameters(*layout, stage),
            width=sizes.width,
            replicas=replicas * parallel.context,
            num_frozen=rank_parameters(*layout, stage, lambda each: not learns(each, frozen)),
            distributed_optimizer=distributed_optimizer,
            zero=zero,
        )
        stages.append(_stage(*layout, stage, sizes, num_micro_batches, state))
    return stages


def _stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    stage: int,
    sizes: Sizes,
    num_micro_batches: int,
    state: State,
) -> StageMemory:
    chunks = stage_chunks(model, parallel, stage)
    layers = [layer for chunk in chunks for layer in chunk]
    waiting = list(in_flight(parallel, stage, num_micro_batches))
    return StageMemory(
        stage=stage,
        layers=layers,
        bridges=sum(len(model.bridges_into(layer)) for layer in layers),
        parameters=_num_stage_parameters(model, parallel, stage),
        rank_parameters=rank_parameters(model, parallel, stage),
        micro_batches=max(map(sum, waiting)),
        state=state,
        activations={
            recompute: _under_way(model, parallel, sizes)
            + _stage_activations(
                [chunk_activations(model, sizes, each, recompute) for each in chunks], waiting
            )
            for recompute in get_args(Recompute)
        },
    )


def stage_chunks(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[range]:
    """Layers of each chunk of a stage."""
    numbers = range(parallel.interleave)
    return [stage_layers(model, parallel, stage=stage, chunk=number) for number in numbers]


def _under_way(model: ModelConfig, parallel: ParallelConfig, sizes: Sizes) -> int:
    """Bytes of states and their gradients, sent and received ahead of their use: the interleaved
    schedule exchanges them while it computes."""
    return 4 * sizes.states(model.joint_size) if parallel.interleave > 1 else 0


def _stage_activations(chunks: list[Activations], waiting: Iterable[list[int]]) -> int:
    """Bytes at the fullest moment of `waiting`, which counts micro-batches of each chunk."""
    return max(_held(chunks, counts) for counts in waiting)


def _held(chunks: list[Activations], counts: list[int]) -> int:
    """Bytes of `counts` micro-batches in each chunk, one of which is at its peak."""
    total = sum(count * chunk.kept for count, chunk in zip(counts, chunks, strict=True))
    return total + max(
        chunk.peak - chunk.kept for count, chunk in zip(counts, chunks, strict=True) if count
    )


def in_flight(parallel: ParallelConfig, stage: int, num_micro_batches: int) -> Iterator[list[int]]:
    """After each forward pass of a step: how many of each chunk wait for their backward pass.

    Megatron's schedules: min(m, PP - stage) without interleaving; with it the chunks take turns by
    groups of PP micro-batches, and a rank runs 2 (PP - stage - 1) + (chunks - 1) PP passes ahead.
    """
    size, chunks = parallel.pipeline, parallel.interleave
    forward = [
        chunk
        for first in range(0, num_micro_batches, size)
        for chunk in range(chunks)
        for _ in range(first, min(first + size, num_micro_batches))
    ]
    backward = [chunks - 1 - chunk for chunk in forward]
    ahead = size - stage - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * size
    counts = [0] * chunks
    for number, chunk in enumerate(forward):
        if number > ahead:
            counts[backward[number - ahead - 1]] -= 1
        counts[chunk] += 1
        yield list(counts)


def chunk_activations(
    model: ModelConfig, sizes: Sizes, layers: range, recompute: Recompute
) -> Activations:
    """Activations of one micro-batch in a chunk that holds `layers`."""
    is_first, is_last = layers.start == 0, layers.stop == model.num_layers
    streams = sum(sizes.states(tower.hidden_size) for tower in model.towers.values())
    names = {tower: f"input {tower}" for tower in model.tower_names}
    if is_first and model.tables == "shared" and not model.projected_towers:
        names = dict.fromkeys(names, "input")
    # What came from the stage in front is cut into the towers' states, what goes on is one again.
    outside = (0 if is_first or not model.is_pair else streams) + (0 if is_last else streams)
    before: list[Step] = []
    most = 0
    # The loss's gradients of tied rows wait for those of the embedding.
    head = loss(model, sizes) if is_last else None
    tied = head.tables if head is not None and is_first and model.tied else 0
    for layer in layers:
        inputs = {names[tower]: sizes.states(model.towers[tower].hidden_size) for tower in names}
        steps = joint_layer(model, layer, sizes, recompute, names)
        if recompute == "full":
            inner = [Step(keeps=inputs), *steps]
            # Its outputs are there a second time.
            most = max(most, kept(before) + backward_peak(inner, sizes) + streams)
            steps = [Step(keeps=inputs | {f"{layer} generator": GENERATOR})]
        before += steps
        most = max(most, backward_peak(before, sizes))
    most += streams + tied
    if head is not None:
        before += head_steps(model, sizes, names)
        most = max(most, kept(before) + streams + head.peak)
        most = max(most, backward_peak(before, sizes) + head.hidden + head.tables)
    if is_first:
        most = max(most, tied + streams + _embedding_peak(model, sizes))
    return Activations(kept=kept(before) + outside, peak=most + outside)


def _embedding_peak(model: ModelConfig, sizes: Sizes) -> int:
    """The gradient of one table as large as the table, and for bf16 its fp32 copy; where it is
    added to Megatron's sums, room that stays unused and an fp32 copy of the rows' gradients."""
    copy = FP32 if sizes.is_low else 0
    most = 0
    for entry in parameter_table(model):
        if entry.name.startswith("embedding."):
            size = _rank_size(entry, sizes.tensor)
            copied = size
            if entry.is_vocabulary and sizes.main_gradients:
                copied = sizes.tokens * entry.shape[1]
            most = max(most, size * sizes.width + copied * copy)
    return most


def rank_parameters(
    model: ModelConfig,
    parallel: ParallelConfig,
    stage: int,
    counts: Callable[[Parameter], bool] = lambda _: True,
) -> int:
    """Weights on each rank of a stage, with padding of the vocabulary and copies of tied tables:
    of all parameters, or of those that `counts` picks."""
    entries = list(_stage_parameters(model, parallel, stage))
    if model.tied and stage == parallel.pipeline - 1 and stage > 0:
        entries += [e for e in parameter_table(model) if e.is_vocabulary]
    return sum(_rank_size(entry, parallel.tensor) for entry in filter(counts, entries))


def _num_stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    return sum(math.prod(e.shape) for e in _stage_parameters(model, parallel, stage))


def _stage_parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int
) -> Iterator[Parameter]:
    layers = {layer for chunk in stage_chunks(model, parallel, stage) for layer in chunk}
    for entry in parameter_table(model):
        in_front = entry.name.startswith("embedding.")
        outside = 0 if in_front else parallel.pipeline - 1
        if entry.layer in layers or (entry.layer is None and stage == outside):
            yield entry


def _rank_size(entry: Parameter, tensor: int) -> int:
    size = math.prod(entry.shape)
    if entry.is_vocabulary:
        size = size // entry.shape[0] * padded_vocabulary(entry.shape[0], tensor)
    return size if entry.split is None else size // tensor
