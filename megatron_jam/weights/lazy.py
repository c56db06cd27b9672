"""Tensors that are known by shape and read when they are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that lies on disk, or is made of some that do."""

    shape: tuple[int, ...]
    """Its shape."""

    dtype: torch.dtype
    """Its dtype."""

    read: Callable[[], Tensor]
    """Makes it: memory-mapped where it lies as it is, else in memory until it is dropped."""


def rows(of: Lazy, start: int, stop: int) -> Lazy:
    """Rows start .. stop - 1 of a tensor."""
    shape = (stop - start, *of.shape[1:])
    return Lazy(shape=shape, dtype=of.dtype, read=lambda: of.read()[start:stop])


def joined(parts: Sequence[Lazy], dim: int) -> Lazy:
    """Tensors one after the other along `dim`."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Lazy(
        shape=tuple(shape),
        dtype=parts[0].dtype,
        read=lambda: torch.cat([part.read() for part in parts], dim=dim),
    )


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    """A tensor of zeros, which lies nowhere."""
    return Lazy(shape=shape, dtype=dtype, read=lambda: torch.zeros(shape, dtype=dtype))
