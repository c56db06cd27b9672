"""Tensors of a child as rows that are made when they are written, so that none is ever whole."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from megatron_jam.ops.average import weighted_average
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.tensor_file import Stored


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A tensor [rows, ...] whose rows can be asked for."""

    shape: tuple[int, ...]
    """Its shape."""

    rows: Callable[[int, int], Tensor]
    """(start, stop) -> those rows."""

    into: Callable[[Tensor, int, int], object] | None = None
    """(out, start, stop): writes those rows to `out`, with one pass less than `rows`."""

    stored: Stored | None = None
    """Where it lies in a parent's file, if it is a parent's as it is."""

    def fill(self, out: Tensor, start: int, stop: int) -> None:
        """Write rows to `out`, in its dtype."""
        if self.into is not None:
            self.into(out, start, stop)
        else:
            out.copy_(self.rows(start, stop))


def filled(
    shape: tuple[int, ...], into: Callable[[Tensor, int, int], object], *parts: Blocks
) -> Blocks:
    """Rows by what writes them, of a dtype that holds those of all `parts`."""

    def rows(start: int, stop: int) -> Tensor:
        dtypes = (part.rows(0, 0).dtype for part in parts)
        out = torch.empty(stop - start, *shape[1:], dtype=reduce(torch.promote_types, dtypes))
        into(out, start, stop)
        return out

    return Blocks(shape=shape, rows=rows, into=into)


def held(tensor: Tensor) -> Blocks:
    """A tensor in memory."""
    return Blocks(shape=tuple(tensor.shape), rows=lambda start, stop: tensor[start:stop])


def parents_own(folder: WeightsFolder, name: str) -> Blocks:
    """A parent's tensor as it lies, memory-mapped."""
    tensor = folder.read(name)
    return Blocks(
        shape=tuple(tensor.shape),
        rows=lambda start, stop: tensor[start:stop],
        stored=folder.stored(name),
    )


def average(a: Blocks, b: Blocks, share: float) -> Blocks:
    """share * a + (1 - share) * b."""
    assert a.shape == b.shape
    return Blocks(
        shape=a.shape,
        rows=lambda i, j: weighted_average(a.rows(i, j), b.rows(i, j), share),
        into=lambda out, i, j: weighted_average(a.rows(i, j), b.rows(i, j), share, out),
    )


def beside(*parts: Blocks) -> Blocks:
    """Matrices side by side: the rows of all, one after the other."""
    ends = [sum(part.shape[1] for part in parts[: n + 1]) for n in range(len(parts))]

    def into(out: Tensor, start: int, stop: int) -> None:
        for part, end in zip(parts, ends, strict=True):
            part.fill(out[:, end - part.shape[1] : end], start, stop)

    return filled((parts[0].shape[0], ends[-1]), into, *parts)


def below(*parts: Blocks) -> Blocks:
    """Tensors one below the other."""
    ends = [sum(part.shape[0] for part in parts[: n + 1]) for n in range(len(parts))]

    def into(out: Tensor, start: int, stop: int) -> None:
        for part, end in zip(parts, ends, strict=True):
            first = end - part.shape[0]
            low, high = max(start, first), min(stop, end)
            if low < high:
                part.fill(out[low - start : high - start], low - first, high - first)

    return filled((ends[-1], *parts[0].shape[1:]), into, *parts)


def zeros_like(of: Blocks) -> Blocks:
    """Zeros of its shape and dtype."""
    return filled(of.shape, lambda out, i, j: out.zero_(), of)


def widened(of: Blocks, columns: int) -> Blocks:
    """A matrix with columns of zeros behind its own."""
    if of.shape[1] == columns:
        return of

    def into(out: Tensor, start: int, stop: int) -> None:
        of.fill(out[:, : of.shape[1]], start, stop)
        out[:, of.shape[1] :] = 0

    return filled((of.shape[0], columns), into, of)
