"""Which layers a pipeline stage holds."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.cost import embedding_flops, head_flops, layer_flops


def stage_layers(model: ModelConfig, parallel: ParallelConfig, *, stage: int, chunk: int) -> range:
    """Layers of chunk number `chunk` on pipeline stage `stage`, counted from 0.

    The chunks follow one another as those of stage 0, 1, ... stages-1, then the second chunk of
    each. With `parallel.balance` layers each gets as many, and where they do not divide the earlier
    ones get one more, as the last has the head; with cost see `balanced_sizes`, where the first
    layer bears the embedding's cost and the last one the head's.

    Raises:
        UsageError: if there are more chunks than layers.
    """
    stages, chunks = parallel.pipeline, parallel.pipeline * parallel.interleave
    if model.num_layers < chunks:
        raise UsageError(
            f"parallel.pipeline {stages} x parallel.interleave {parallel.interleave} needs at least"
            f" {chunks} layers; the model has {model.num_layers}"
        )
    if parallel.balance == "cost":
        sizes = balanced_sizes(tuple(layer_costs(model)), chunks)
    else:
        size, rest = divmod(model.num_layers, chunks)
        sizes = tuple(size + (index < rest) for index in range(chunks))
    index = chunk * stages + stage
    first = sum(sizes[:index])
    return range(first, first + sizes[index])


def layer_costs(model: ModelConfig) -> list[int]:
    """Forward FLOPs a token of each layer over max_positions tokens, with what stands in front of
    the first one and behind the last."""
    costs = [sum(parts) for parts in layer_flops(model, model.max_positions)]
    costs[0] += embedding_flops(model)
    costs[-1] += head_flops(model)
    return costs


@cache
def balanced_sizes(costs: tuple[int, ...], chunks: int) -> tuple[int, ...]:
    """How many layers in a row each chunk gets, at least one.

    The largest chunk's cost is the least possible, as the slowest stage sets the pipeline's pace.
    Of such splits the most even one is taken (least sum of squared costs), then the one with fewer
    layers in the last chunk, in the last but one and so on.
    """
    before = [0, *accumulate(costs)]
    limit = _best(before, chunks, None)[0]
    return _best(before, chunks, limit)[1]


def _best(before: Sequence[int], chunks: int, limit: int | None) -> tuple[int, tuple[int, ...]]:
    """Dynamic programme over (chunks, layers in front): least largest cost or, under a `limit` of
    each chunk's cost, least sum of squares; and the sizes. `before[i]` is the cost of i layers."""
    num_layers = len(before) - 1
    best: list[tuple | None] = [(0, ()), *[None] * num_layers]
    for _ in range(chunks):
        reached: list[tuple | None] = [None] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            options = []
            for start in range(end):
                cost, so_far = before[end] - before[start], best[start]
                if so_far is None or (limit is not None and cost > limit):
                    continue
                total = max(so_far[0], cost) if limit is None else so_far[0] + cost**2
                # Sizes from the last chunk on, so that ties go to fewer layers late.
                options.append((total, (end - start, *so_far[1])))
            reached[end] = min(options, default=None)
        best = reached
    total, sizes = best[-1]  # type: ignore[misc]
    return total, tuple(reversed(sizes))
