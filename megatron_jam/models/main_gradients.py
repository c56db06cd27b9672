"""Gradients that a layer adds by itself to the sums of Megatron's wrapper, as its linear layers do.

The wrapper keeps a sum for each weight, `main_grad`, in fp32 also where weights are bf16. Autograd
would make a gradient as large as the table for each use of it in each micro-batch, add those up,
and then add them to the sum.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def added(weight: nn.Parameter) -> Tensor:
    """What a backward pass returns for a weight whose sum has its gradient already: the wrapper
    does not read it, but looks whether there is one."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class LookUp(torch.autograd.Function):
    """Rows [..., d] of a weight [n, d] by numbers int64 [...], as F.embedding; each row's gradient
    is added to its sum, in the same order in every run."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, weight: nn.Parameter) -> Tensor:  # type: ignore[override]
        """See above."""
        ctx.save_for_backward(numbers, weight)
        return F.embedding(numbers, weight)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        """Add to the sum."""
        numbers, weight = ctx.saved_tensors
        total = weight.main_grad
        # Not index_add_, which on a GPU adds in any order.
        total.index_put_((numbers,), slopes.to(total.dtype), accumulate=True)
        return None, added(weight)
