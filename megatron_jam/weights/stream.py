"""Safetensors files written tensor by tensor, whatever their number and size."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, write_json, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.ops.sha256 import ALONE, LANES, Sha256, best_alone
from megatron_jam.weights.jobs import Jobs
from megatron_jam.weights.tensor_file import Stored, TensorFile, header_of

INDEX = "model.safetensors.index.json"
"""Which file holds which tensor."""
JOURNAL = "journal.json"
"""Which files of an unfinished folder are whole, and of what they were made."""

_PIECE_BYTES = 2 << 20
"""Of a tensor in memory, written at once: still in the cache when it is hashed."""
_BLOCK_BYTES = 1 << 20
"""Of rows that are made at once."""
_WAITING_BYTES = 48 << 20
"""Of pieces that may wait to be hashed and written."""
_HASH, _WRITE, _COPY = "hash", "write", ""
"""Kinds of jobs. Of two threads that write to a file one spins; that copy within the kernel, less.
"""

Fill = Callable[[Tensor, int, int], None]
"""(out, start, stop): writes rows start .. stop - 1 of a tensor to `out`."""


class TensorStream:
    """Writes tensors to planned places in as many files as it takes.

    The caller's thread makes rows, which are hashed and then written by a second one, or by the
    first where it is ahead.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        file_bytes: int = 4 << 30,
        resume: str = "",
    ) -> None:
        """Plan the files; the first tensor of each makes it.

        Args:
            folder: where they are made; it must exist by then.
            shapes: shape of each tensor by name, in the order in which they will lie.
            dtype: of all tensors.
            file_bytes: largest size of one file, in bytes, unless one tensor is larger.
            resume: what all the tensors are made of, in short: whole files that an interrupted
                stream of the same left in the folder are kept, if tensors were written in their
                order. "" keeps none, and no journal.
        """
        self._folder, self._dtype, self._shapes = folder, dtype, dict(shapes)
        self._files = _plan(self._shapes, dtype.itemsize, file_bytes)
        self._number = {name: i for i, names in enumerate(self._files) for name in names}
        self._resume = resume and _sha256_of([resume, str(dtype), self._shapes, file_bytes])
        self._whole: list[dict[str, str]] = []
        self._open: dict[int, TensorFile] = {}
        self._jobs = Jobs("stream")
        self._handed_over = self._written = 0
        self._free: list[_Buffer] = []
        self._done: set[str] = set()
        self._digests: dict[str, str] = {}

    def go_on(self) -> list[str]:
        """Keep the files that are whole; the names that are left to be written."""
        self._whole = self._found()
        if self._whole:
            logger.info("goes on: %d of %d files are whole", len(self._whole), len(self._files))
        for names in self._whole:
            self._digests.update(names)
            self._done.update(names)
        return [name for name in self._shapes if name not in self._done]

    def _found(self) -> list[dict[str, str]]:
        """What the journal says, if it is of the same tensors, and the files are there."""
        path = self._folder / JOURNAL
        if not self._resume or not path.is_file():
            return []
        try:
            journal = read_json(path)
        except UsageError:  # damaged: all is written anew
            return []
        if journal.get("of") != self._resume:
            return []
        for index, names in enumerate(self._files[: len(journal["files"])]):
            file = self._path(index)
            size = len(self._header(names)) + sum(self._bytes(name) for name in names)
            if not file.is_file() or file.stat().st_size != size:
                return journal["files"][:index]
        return journal["files"]

    def _header(self, names: Iterable[str]) -> bytes:
        return header_of({name: self._shapes[name] for name in names}, self._dtype)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of its planned shape, which must stay as it is until :meth:`finish`."""
        assert tuple(tensor.shape) == self._shapes[name], f"{name}: shape {tuple(tensor.shape)}"
        data = memoryview(_bytes_of(tensor.detach().to("cpu", self._dtype).contiguous()))
        digest, file = hashlib.sha256(), self._file_of(name)
        for start in range(0, len(data), _PIECE_BYTES):
            part = data[start : start + _PIECE_BYTES]
            self._hand_over([_Piece(file, name, start, part)], partial(digest.update, part))
        self._finish(name, digest.hexdigest)

    def write_together(self, tensors: Mapping[str, Fill]) -> None:
        """Write tensors, some rows of each in turn: many are hashed faster together.

        Args:
            tensors: by name, what writes rows into a buffer of their shape and the stream's dtype.
        """
        names = sorted(tensors, key=self._bytes, reverse=True)
        alone = best_alone([self._bytes(name) for name in names])
        single, others = deque(names[:alone]), deque(names[alone:])
        queues = {ALONE: single} | {lane: others for lane in range(LANES)}
        digest, growing = Sha256(), dict[int, Iterator[_Piece]]()
        while True:
            for place, queue in queues.items():
                if queue and place not in growing:
                    name = queue.popleft()
                    growing[place] = self._pieces(name, tensors[name])
            if not growing:
                return
            made = {place: next(pieces) for place, pieces in growing.items()}
            read = {place: piece.read for place, piece in made.items()}
            self._hand_over(list(made.values()), partial(digest.update, read))
            for place, piece in made.items():
                if piece.is_last:
                    del growing[place]
                    self._finish(piece.name, partial(digest.hexdigest, place))

    def _pieces(self, name: str, fill: Fill) -> Iterator["_Piece"]:
        """Some rows after others of a tensor, in buffers that are used again."""
        file, (count, *shape) = self._file_of(name), self._shapes[name]
        width = max(1, torch.Size(shape).numel())
        row = width * self._dtype.itemsize
        step = max(1, _BLOCK_BYTES // row)
        for start in range(0, max(count, 1), step):
            stop = min(start + step, count)
            buffer = self._buffer(step * width)
            fill(buffer.values[: (stop - start) * width].view(stop - start, *shape), start, stop)
            read = buffer.read[: (stop - start) * row]
            yield _Piece(file, name, start * row, read, buffer, stop == count)

    def _buffer(self, size: int) -> "_Buffer":
        """One of at least `size` numbers that nobody reads any more."""
        found = self._free.pop() if self._free else None
        if found is not None and len(found.values) >= size:
            return found
        values = torch.empty(max(size, _BLOCK_BYTES // self._dtype.itemsize), dtype=self._dtype)
        return _Buffer(values, memoryview(_bytes_of(values)))

    def _hand_over(self, pieces: Sequence["_Piece"], hashing: Callable[[], None]) -> None:
        """Have pieces hashed and written; their buffers are free when they are."""
        self._handed_over += sum(len(piece.read) for piece in pieces)
        self._jobs.put(_HASH, partial(self._hash, pieces, hashing))
        while self._handed_over - self._written > _WAITING_BYTES:
            self._jobs.help()

    def _hash(self, pieces: Sequence["_Piece"], hashing: Callable[[], None]) -> None:
        hashing()
        self._jobs.put(_WRITE, partial(self._write, pieces))

    def _write(self, pieces: Sequence["_Piece"]) -> None:
        for piece in pieces:
            piece.file.write(piece.name, piece.offset, piece.read)
            if piece.buffer is not None:
                self._free.append(piece.buffer)
        self._written += sum(len(piece.read) for piece in pieces)

    def copy(self, name: str, stored: Stored) -> None:
        """Write a tensor that lies as it is in another file.

        Raises:
            UsageError: the file is shorter than it was; now, or in a later call.
        """
        assert stored.size == self._bytes(name), f"{name}: {stored.size} bytes"
        self._jobs.put(_COPY, partial(self._file_of(name).copy, name, stored))
        self._finish(name, lambda: stored.sha256)

    def _file_of(self, name: str) -> TensorFile:
        """The file in which a tensor has its place."""
        assert name not in self._done, f"{name} was written before"
        number = self._number[name]
        if number not in self._open:
            sizes = {each: self._bytes(each) for each in self._files[number]}
            header = self._header(self._files[number])
            self._open[number] = TensorFile(self._path(number), header, sizes)
        return self._open[number]

    def _finish(self, name: str, digest: Callable[[], str]) -> None:
        """A tensor was handed over, whose digest is known behind its last piece's; have its file
        closed with the last one."""
        self._jobs.put(_HASH, partial(self._keep, name, digest))
        self._done.add(name)
        number = self._number[name]
        if not self._done.issuperset(self._files[number]):
            return
        self._jobs.finish()
        self._open.pop(number).close()
        if self._resume and number == len(self._whole):
            self._whole.append({each: self._digests[each] for each in self._files[number]})
            journal = {"of": self._resume, "files": self._whole}
            write_text_atomically(self._folder / JOURNAL, json.dumps(journal))

    def _keep(self, name: str, digest: Callable[[], str]) -> None:
        self._digests[name] = digest()

    def _bytes(self, name: str) -> int:
        return torch.Size(self._shapes[name]).numel() * self._dtype.itemsize

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of what was written, by name."""
        self._jobs.finish()
        return {name: self._digests[name] for name in self._shapes if name in self._digests}

    def finish(self) -> None:
        """Write the index, when all tensors are written."""
        self._check_whole()
        place = {name: self._path(number).name for name, number in self._number.items()}
        (self._folder / JOURNAL).unlink(missing_ok=True)
        write_json(self._folder / INDEX, {"metadata": {}, "weight_map": place})

    def read_back(self, name: str) -> Tensor:
        """A tensor as it was written; after the last was."""
        self._check_whole()
        # "pt" is the package's own name for torch.
        with safe_open(str(self._path(self._number[name])), framework="pt") as file:
            return file.get_tensor(name)

    def _check_whole(self) -> None:
        assert len(self._done) == len(self._shapes), "tensors are missing"

    def close(self) -> None:
        """Let go of files and the thread, also where tensors are missing."""
        self._jobs.close()
        for file in self._open.values():
            file.release()
        self._open.clear()

    def _path(self, index: int) -> Path:
        return self._folder / f"model-{index + 1:05d}-of-{len(self._files):05d}.safetensors"


def _sha256_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Hex digest of a contiguous tensor's bytes."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.view(torch.uint8).numpy().reshape(-1)


class _Buffer(NamedTuple):
    """Room for rows."""

    values: Tensor
    read: memoryview


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a tensor."""

    file: TensorFile
    name: str
    offset: int
    read: memoryview
    buffer: _Buffer | None = None
    is_last: bool = True


def _plan(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files
