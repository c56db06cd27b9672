"""Safetensors files written tensor by tensor, whatever their number and size."""

import errno
import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, write_json, write_text_atomically, writing
from megatron_jam.config.log import logger
from megatron_jam.ops.sha256 import Sha256

INDEX = "model.safetensors.index.json"
"""Which file holds which tensor."""
JOURNAL = "journal.json"
"""Which files of an unfinished folder are whole, and of what they were made."""

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE_BYTES = 2 << 20
"""Of a tensor in memory, written at once: still in the cache when it is hashed."""
_BLOCK_BYTES = 1 << 18
"""Of rows that are made at once."""
_LINE_BYTES = 64
"""Of the cache."""
_WAITING_BYTES = 8 << 20
"""Of pieces that may wait for their hash."""

Fill = Callable[[Tensor, int, int], None]
"""(out, start, stop): writes rows start .. stop - 1 of a tensor to `out`."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where the bytes of a tensor lie."""

    path: Path
    """Its file."""

    offset: int
    """Of its first byte in the file."""

    size: int
    """In bytes."""

    sha256: str
    """Of its bytes, as they were once written."""


class TensorStream:
    """Writes tensors to planned places in as many files as it takes.

    One thread makes rows, a second one writes them, a third one computes their hashes.
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
        self._open: dict[int, _OpenFile] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hasher")
        self._waiting: deque[tuple[list[Future], int, list[NDArray[np.uint8]]]] = deque()
        self._free: list[NDArray[np.uint8]] = []
        self._digests: dict[str, Future | str] = {}

    def go_on(self) -> list[str]:
        """Keep the files that are whole; the names that are left to be written."""
        self._whole = self._found()
        if self._whole:
            logger.info("goes on: %d of %d files are whole", len(self._whole), len(self._files))
        for names in self._whole:
            self._digests.update(names)
        return [name for name in self._shapes if name not in self._digests]

    def _found(self) -> list[dict[str, str]]:
        """What the journal says, if it is of the same tensors, and the files are there."""
        path = self._folder / JOURNAL
        if not self._resume or not path.is_file():
            return []
        journal = read_json(path)
        if journal.get("of") != self._resume:
            return []
        for index, names in enumerate(self._files[: len(journal["files"])]):
            file = self._path(index)
            size = len(self._header(names)) + sum(self._bytes(name) for name in names)
            if not file.is_file() or file.stat().st_size != size:
                return journal["files"][:index]
        return journal["files"]

    def _header(self, names: Iterable[str]) -> bytes:
        return _header({name: self._shapes[name] for name in names}, self._dtype)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of its planned shape, which must stay as it is until :meth:`finish`."""
        assert tuple(tensor.shape) == self._shapes[name], f"{name}: shape {tuple(tensor.shape)}"
        data = memoryview(_bytes_of(tensor.detach().to("cpu", self._dtype).contiguous()))
        digest, file = Sha256(1), self._file_of(name)
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            self._hand_over([(file, name, start, piece)], digest, [])
        self._finish(name, self._hasher.submit(lambda: digest.hexdigests()[0]))

    def write_together(self, tensors: Mapping[str, Fill]) -> None:
        """Write tensors of one shape, some rows of each in turn: many are hashed faster together.

        Args:
            tensors: by name, what writes rows into a buffer of their shape and the stream's dtype.
        """
        (shape,) = {self._shapes[name] for name in tensors}
        files = {name: self._file_of(name) for name in tensors}
        row = max(1, torch.Size(shape[1:]).numel() * self._dtype.itemsize)
        step = max(1, _BLOCK_BYTES // row)
        digest = Sha256(len(tensors))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            pieces: list[_Piece] = []
            buffers: list[NDArray[np.uint8]] = []
            for name, fill in tensors.items():
                buffer = self._buffer(step * row)
                piece = buffer[: (stop - start) * row]
                rows = torch.from_numpy(piece).view(self._dtype)
                fill(rows.view(stop - start, *shape[1:]), start, stop)
                pieces.append((files[name], name, start * row, memoryview(piece)))
                buffers.append(buffer)
            self._hand_over(pieces, digest, buffers)
        found = self._hasher.submit(digest.hexdigests)
        for place, name in enumerate(tensors):
            self._finish(name, self._hasher.submit(lambda i=place: found.result()[i]))

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        """One of at least `size` bytes that nobody reads any more."""
        found = self._free.pop() if self._free else np.empty(0, dtype=np.uint8)
        return found if len(found) >= size else np.empty(max(size, _BLOCK_BYTES), dtype=np.uint8)

    def _hand_over(
        self, pieces: Sequence["_Piece"], digest: Sha256, buffers: list[NDArray[np.uint8]]
    ) -> None:
        """Have pieces written and hashed; `buffers` are free when they are."""
        read = [piece for *_, piece in pieces]
        jobs = [
            self._writer.submit(_write_all, pieces),
            self._hasher.submit(digest.update, read),
        ]
        self._waiting.append((jobs, sum(map(len, read)), buffers))
        while len(self._waiting) > 1 and sum(n for _, n, _ in self._waiting) > _WAITING_BYTES:
            self._await_first()

    def _await_first(self) -> None:
        jobs, _, buffers = self._waiting.popleft()
        for job in jobs:
            job.result()
        self._free += buffers

    def copy(self, name: str, stored: Stored) -> None:
        """Write a tensor that lies as it is in another file.

        Raises:
            UsageError: the file is shorter than it was; now, or in a later call.
        """
        assert stored.size == self._bytes(name), f"{name}: {stored.size} bytes"
        job = self._writer.submit(self._file_of(name).copy, name, stored)
        self._waiting.append(([job], 0, []))
        self._finish(name, stored.sha256)

    def _file_of(self, name: str) -> "_OpenFile":
        """The file in which a tensor has its place."""
        assert name not in self._digests, f"{name} was written before"
        number = self._number[name]
        if number not in self._open:
            sizes = {each: self._bytes(each) for each in self._files[number]}
            header = self._header(self._files[number])
            self._open[number] = _OpenFile(self._path(number), header, sizes)
        return self._open[number]

    def _finish(self, name: str, digest: Future | str) -> None:
        """A tensor was written; close its file after the last one."""
        self._digests[name] = digest
        number = self._number[name]
        if not all(each in self._digests for each in self._files[number]):
            return
        while self._waiting:
            self._await_first()
        self._open.pop(number).close()
        if self._resume and number == len(self._whole):
            hashes = self.hashes
            self._whole.append({each: hashes[each] for each in self._files[number]})
            journal = {"of": self._resume, "files": self._whole}
            write_text_atomically(self._folder / JOURNAL, json.dumps(journal))

    def _bytes(self, name: str) -> int:
        return torch.Size(self._shapes[name]).numel() * self._dtype.itemsize

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of what was written, by name."""
        return {n: d if isinstance(d, str) else d.result() for n, d in self._digests.items()}

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
        assert len(self._digests) == len(self._shapes), "tensors are missing"

    def close(self) -> None:
        """Let go of files and threads, also where tensors are missing."""
        for thread in (self._writer, self._hasher):
            thread.shutdown(cancel_futures=True)
        for file in self._open.values():
            file.release()
        self._open.clear()

    def _path(self, index: int) -> Path:
        return self._folder / f"model-{index + 1:05d}-of-{len(self._files):05d}.safetensors"


class _OpenFile:
    """A safetensors file whose tensors are written in any order."""

    def __init__(self, path: Path, header: bytes, sizes: Mapping[str, int]) -> None:
        """Write the header; `sizes` of the tensors in bytes, in order."""
        self._path, self._places, end = path, dict[str, int](), len(header)
        for name, size in sizes.items():
            self._places[name] = end
            end += size
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write(0, memoryview(header))

    def write(self, name: str, offset: int, piece: memoryview) -> None:
        """Write bytes of a tensor from `offset` on."""
        try:
            self._write(self._places[name] + offset, piece)
        except OSError as error:
            if error.errno == errno.EFAULT:
                # It lies in a mapped file that was cut off: reading it here says of which
                # (config/faults.py).
                bytes(piece)
            raise

    def _write(self, place: int, piece: memoryview) -> None:
        with writing(self._path):
            while piece:
                done = os.pwrite(self._file, piece, place)
                place, piece = place + done, piece[done:]

    def copy(self, name: str, stored: Stored) -> None:
        """Copy a tensor within the kernel; UsageError if the other file has not so much."""
        with stored.path.open("rb") as source, writing(self._path):
            os.lseek(self._file, self._places[name], os.SEEK_SET)
            if not _copy_range(source.fileno(), stored.offset, self._file, stored.size):
                raise UsageError(f"{stored.path} was cut off while it was read: run this again")

    def close(self) -> None:
        """Have it on the disk."""
        with writing(self._path):
            os.fsync(self._file)
        self.release()

    def release(self) -> None:
        """Close it as it is."""
        os.close(self._file)


def _sha256_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Hex digest of a contiguous tensor's bytes."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.view(torch.uint8).numpy().reshape(-1)


_Piece = tuple[_OpenFile, str, int, memoryview]
"""(file, tensor, offset in it, bytes)."""


def _write_all(pieces: Sequence[_Piece]) -> None:
    for file, name, offset, piece in pieces:
        file.write(name, offset, piece)


def _copy_range(source: int, offset: int, target: int, size: int) -> bool:
    """Copy within the kernel, from `offset` of one file to the place of the other; whether the
    first had so much."""
    while size:
        done = os.sendfile(target, source, offset, size)
        if not done:
            return False
        offset, size = offset + done, size - done
    return True


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


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file: length, then JSON padded to whole lines of the cache."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _LINE_BYTES)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> dict[str, tuple[int, int]]:
    """Where the bytes start and stop of each tensor in a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    return {
        name: (8 + size + entry["data_offsets"][0], 8 + size + entry["data_offsets"][1])
        for name, entry in entries.items()
        if name != "__metadata__"
    }
