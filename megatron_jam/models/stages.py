"""Which layers a pipeline stage holds."""

from megatron_jam.config.errors import UsageError


def stage_layers(num_layers: int, *, stages: int, interleave: int, stage: int, chunk: int) -> range:
    """Layers of chunk number `chunk` on pipeline stage `stage`, counted from 0.

    The chunks follow one another as those of stage 0, 1, ... stages-1, then the second chunk of
    each. Where the layers do not divide the earlier chunks get one more: the last has the head.
    """
    chunks = stages * interleave
    if num_layers < chunks:
        raise UsageError(
            f"parallel.pipeline {stages} x parallel.interleave {interleave} needs at least {chunks}"
            f" layers; the model has {num_layers}"
        )
    size, rest = divmod(num_layers, chunks)
    index = chunk * stages + stage
    first = index * size + min(index, rest)
    return range(first, first + size + (index < rest))
