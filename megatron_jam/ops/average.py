"""The weighted average of two tensors in one pass over memory: face of the compiled function."""

import torch
from torch import Tensor

from megatron_jam.ops import extension


def weighted_average(a: Tensor, b: Tensor, share: float, out: Tensor | None = None) -> Tensor:
    """share * a + (1 - share) * b, elementwise (paper eq. 1 with 1/2).

    Specification: ops/reference.py.

    Args:
        a: float64, float32, bfloat16 or float16 of any shape, on the CPU.
        b: of the same shape.
        share: of `a`, in 0..1.
        out: where to write it: contiguous, or a matrix whose rows are; none makes a tensor.

    Returns:
        `out`, or a contiguous tensor of the inputs' dtype (of unlike ones, the one that holds
        both), rounded once: from fp32 to 16 bits, from fp64 to fp32.

    Raises:
        ValueError: the shapes or the dtype of `out` differ, or the numbers are of another kind.
    """
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    if out is None:
        out = torch.empty_like(a, memory_format=torch.contiguous_format)
    extension.weighted_average(a, b, share, out)
    return out
