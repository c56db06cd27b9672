"""Tensors that are known by shape and read when they are asked for."""

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 4 << 20
"""Of rows that are copied or compared at once."""
_MAPPED_BYTES = 1 << 20
"""From here on a tensor has pages of its own."""


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that lies on disk, or is made of some that do."""

    shape: tuple[int, ...]
    """Its shape."""

    dtype: torch.dtype
    """Its dtype."""

    read: Callable[[], Tensor]
    """Makes it: memory-mapped where it lies as it is, else in memory until it is dropped."""

    cut: Callable[[int, int], Tensor] | None = None
    """Makes rows start .. stop - 1 likewise, and no others; None takes them from the whole."""


def rows(of: Lazy, start: int, stop: int) -> Lazy:
    """Rows start .. stop - 1 of a tensor."""

    def cut(first: int, last: int) -> Tensor:
        return _rows(of, start + first, start + last)

    shape = (stop - start, *of.shape[1:])
    return Lazy(shape=shape, dtype=of.dtype, read=lambda: cut(0, stop - start), cut=cut)


def joined(parts: Sequence[Lazy], dim: int) -> Lazy:
    """Tensors of one dtype one after the other along `dim`, 0 or 1; the whole is made once."""
    if len(parts) == 1:
        return parts[0]
    sizes = [part.shape[dim] for part in parts]
    shape, dtype = list(parts[0].shape), parts[0].dtype
    shape[dim] = sum(sizes)

    def cut(start: int, stop: int) -> Tensor:
        whole = empty((stop - start, *shape[1:]), dtype)
        offset = 0
        for part, size in zip(parts, sizes, strict=True):
            if dim == 0:
                low, high = max(start - offset, 0), min(stop - offset, size)
                out = whole[max(offset - start, 0) :]
            else:
                low, high, out = start, stop, whole[:, offset : offset + size]
            for first, last in _blocks(part, low, high):
                out[first - low : last - low] = _rows(part, first, last)
            offset += size
        return whole

    return Lazy(shape=tuple(shape), dtype=dtype, read=lambda: cut(0, shape[0]), cut=cut)


def read_as(of: Lazy, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, some rows at a time: in its own it is not in memory beside it."""
    if of.cut is None or of.dtype == dtype:
        return of.read().to(dtype)
    whole = empty(of.shape, dtype)
    for first, last in _blocks(of, 0, of.shape[0]):
        whole[first:last] = of.cut(first, last)
    return whole


def same(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors are equal, compared some rows at a time."""
    if one.shape != other.shape:
        return False
    return all(
        torch.equal(_rows(one, *block), _rows(other, *block))
        for block in _blocks(one, 0, one.shape[0])
    )


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor whose memory the system has back as soon as it is dropped.

    malloc keeps what is smaller than 32 MB, and tensors that wait for another thread tear holes in
    that: hundreds of megabytes, of a large checkpoint.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < _MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(room, dtype=dtype).view(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    """A tensor of zeros, which lies nowhere."""
    return Lazy(shape=shape, dtype=dtype, read=lambda: torch.zeros(shape, dtype=dtype))


def _rows(of: Lazy, start: int, stop: int) -> Tensor:
    return of.read()[start:stop] if of.cut is None else of.cut(start, stop)


def _blocks(of: Lazy, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows start .. stop - 1 in runs of a few megabytes, each as its first row and its end."""
    row = torch.Size(of.shape[1:]).numel() * of.dtype.itemsize
    step = max(1, _BLOCK_BYTES // max(1, row))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
