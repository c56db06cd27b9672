"""The weighted average of two tensors in one pass over memory."""

import torch
from torch import Tensor


def weighted_average(a: Tensor, b: Tensor, share: float) -> Tensor:
    """share * a + (1 - share) * b, elementwise (paper eq. 1 with 1/2).

    Args:
        a: of any shape.
        b: of the same shape.
        share: of `a`, in 0..1.

    Returns:
        A tensor of the inputs' dtype (of unlike ones, the one that holds both), rounded once from
        fp32 for bf16 and fp16, from fp64 for fp32 and fp64.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    exact = torch.float32 if dtype.itemsize == 2 else torch.float64
    return (a.to(exact) * share + b.to(exact) * (1 - share)).to(dtype)
