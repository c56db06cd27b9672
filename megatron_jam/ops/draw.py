"""Random numbers as a function of (key, index): any stretch of a tensor is drawn by itself."""

from typing import Literal

import torch
from torch import Tensor

from megatron_jam.ops.extension import draw

Kind = Literal["uniform", "cut_normal", "normal"]


def drawn(kind: Kind, key: int, start: int, count: int, scale: float) -> Tensor:
    """Numbers start .. start + count - 1 of the endless row that `key` names.

    The same on every processor and for any number of threads. Specification: ops/reference.py.

    Args:
        kind: uniform in -scale .. scale; normal with deviation `scale`, whole (up to 5.3 of it) or
            cut at 3.
        key: in 0 .. 2^64 - 1.
        start: the first, 0 or more.
        count: how many.
        scale: half the width, or the deviation.

    Returns:
        float32 [count].
    """
    out = torch.empty(count)
    draw(out.numpy(), kind, key, start, scale)
    return out
