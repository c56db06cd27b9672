"""Cross-entropy over a vocabulary that tensor parallelism splits.

Megatron's own casts float64 to fp32, reads a global group and counts padded rows; this one does
none of that. Letters: S sequence, B batch, v this rank's share of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, *, num_real: int, group: dist.ProcessGroup
) -> Tensor:
    """Negative log-likelihood of each label.

    Args:
        logits: this rank's share, [S, B, v]; rank r holds ids r*v ... r*v + v - 1.
        labels: int64 [S, B], the same on every rank of `group`.
        num_real: columns of this rank that are no padding.
        group: the tensor-parallel ranks.

    Returns:
        Nats [S, B], in fp32 (float64 for float64 logits).
    """
    return _CrossEntropy.apply(logits, labels, num_real, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, num_real: int, group: Any) -> Tensor:
        width = logits.shape[-1]
        real = logits[..., :num_real]
        real = real.float() if logits.dtype.itemsize < 4 else real
        shape = labels.shape
        # A rank whose rows are all padding takes part with nothing.
        top = real.amax(-1) if num_real else real.new_full(shape, -torch.inf)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        shifted = real - top.unsqueeze(-1)
        local = labels - dist.get_rank(group) * width
        mine = (local >= 0) & (local < num_real)
        local = torch.where(mine, local, 0)
        sums = real.new_zeros(2, *shape)
        if num_real:
            sums[1] = torch.where(mine, shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1), 0)
            shifted.exp_()
            sums[0] = shifted.sum(-1)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(shifted.div_(sums[0].unsqueeze(-1)), local, mine)
        ctx.width, ctx.dtype = width, logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        softmax, local, mine = ctx.saved_tensors
        gradient = softmax * grad.unsqueeze(-1)
        if gradient.shape[-1]:
            gradient.scatter_add_(-1, local.unsqueeze(-1), -(grad * mine).unsqueeze(-1))
        missing = ctx.width - gradient.shape[-1]
        gradient = torch.nn.functional.pad(gradient, (0, missing)) if missing else gradient
        return gradient.to(ctx.dtype), None, None, None
