"""Tensors of a child as rows that are made when they are written, so that none is ever whole."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jam.ops.average import weighted_average
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.stream import Stored

BLOCK_BYTES = 1 << 20
"""Of rows that are made at once."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A tensor [rows, ...] whose rows can be asked for."""

    shape: tuple[int, ...]
    """Its shape."""

    rows: Callable[[int, int], Tensor]
    """(start, stop) -> those rows."""

    stored: Stored | None = None
    """Where it lies in a parent's file, if it is a parent's as it is."""

    def __iter__(self) -> Iterator[Tensor]:
        """All rows, about BLOCK_BYTES at a time."""
        if not self.shape[0]:
            return
        size = self.rows(0, 1)
        step = max(1, BLOCK_BYTES // (size.numel() * size.element_size()))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))


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
        shape=a.shape, rows=lambda i, j: weighted_average(a.rows(i, j), b.rows(i, j), share)
    )


def beside(*parts: Blocks) -> Blocks:
    """Matrices side by side: the rows of all, one after the other."""
    columns = sum(part.shape[1] for part in parts)
    return Blocks(
        shape=(parts[0].shape[0], columns),
        rows=lambda i, j: torch.cat([part.rows(i, j) for part in parts], dim=1),
    )


def below(*parts: Blocks) -> Blocks:
    """Tensors one below the other."""
    ends = [sum(part.shape[0] for part in parts[: n + 1]) for n in range(len(parts))]

    def rows(start: int, stop: int) -> Tensor:
        found = [
            part.rows(max(start - end + part.shape[0], 0), min(stop - end, 0) + part.shape[0])
            for part, end in zip(parts, ends, strict=True)
            if start < end and stop > end - part.shape[0]
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    return Blocks(shape=(ends[-1], *parts[0].shape[1:]), rows=rows)


def zeros_like(of: Blocks) -> Blocks:
    """Zeros of its shape and dtype."""
    return Blocks(shape=of.shape, rows=lambda i, j: torch.zeros_like(of.rows(i, j)))


def widened(of: Blocks, columns: int) -> Blocks:
    """A matrix with columns of zeros behind its own."""
    if of.shape[1] == columns:
        return of
    fill = columns - of.shape[1]
    return Blocks(
        shape=(of.shape[0], columns),
        rows=lambda i, j: torch.nn.functional.pad(of.rows(i, j), (0, fill)),
    )
