"""The weighted average of two tensors in one pass over memory: face of the compiled operator."""

import torch
from torch import Tensor

from megatron_jam.ops import extension  # noqa: F401  (registers the operator)


def weighted_average(a: Tensor, b: Tensor, share: float) -> Tensor:
    """share * a + (1 - share) * b, elementwise (paper eq. 1 with 1/2).

    Specification: ops/reference.py.

    Args:
        a: float64, float32, bfloat16 or float16 of any shape, on the CPU.
        b: of the same shape.
        share: of `a`, in 0..1.

    Returns:
        A contiguous tensor of the inputs' dtype (of unlike ones, the one that holds both), rounded
        once: from fp32 to 16 bits, from fp64 to fp32.

    Raises:
        ValueError: the shapes differ, or the numbers are of another kind.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.ops.megatron_jam.weighted_average(a.to(dtype), b.to(dtype), share)


@torch.library.register_fake("megatron_jam::weighted_average")
def _fake(a: Tensor, b: Tensor, share: float) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)
