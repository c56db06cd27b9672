"""Which tokens of a sequence a context-parallel rank holds."""

from torch import Tensor


def context_share(batch: Tensor, rank: int, size: int) -> Tensor:
    """The part of [B, S] that rank `rank` of `size` holds, [B, S / size].

    A sequence is cut into 2 x size pieces, of which rank r holds piece r and the r-th from the end,
    as Megatron and Transformer Engine do: causal attention then takes every rank equally long.
    """
    if size == 1:
        return batch
    pieces = batch.unflatten(1, (2 * size, -1))
    return pieces[:, [rank, 2 * size - 1 - rank]].flatten(1, 2)
