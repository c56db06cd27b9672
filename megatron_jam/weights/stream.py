"""Safetensors files written tensor by tensor, whatever their number and size."""

import errno
import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, write_json, write_text_atomically, writing
from megatron_jam.config.log import logger

INDEX = "model.safetensors.index.json"
"""Which file holds which tensor."""
JOURNAL = "journal.json"
"""Which files of an unfinished folder are whole, and of what they were made."""

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE_BYTES = 2 << 20
"""Written and hashed at once: small enough to stay in a core's cache between the two."""
_WAITING = 4
"""Pieces that may wait for their hash."""


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
    """Writes tensors in a planned order into as many files as it takes.

    Hashes are computed by a second thread, while the first writes.
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
        """Plan the files; the first tensor makes the first of them.

        Args:
            folder: where they are made; it must exist by then.
            shapes: shape of each tensor by name, in the order in which they will be written.
            dtype: of all tensors.
            file_bytes: largest size of one file, in bytes, unless one tensor is larger.
            resume: what all the tensors are made of, in short: whole files that an interrupted
                stream of the same left in the folder are kept. "" keeps none, and no journal.
        """
        self._folder, self._dtype, self._shapes = folder, dtype, dict(shapes)
        self._files = _plan(self._shapes, dtype.itemsize, file_bytes)
        self._resume = resume and _sha256_of([resume, str(dtype), self._shapes, file_bytes])
        self._whole: list[dict[str, str]] = []
        self._queue = iter(self._steps())
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hasher")
        self._waiting: deque[Future] = deque()
        self._digests: dict[str, Future | str] = {}

    def _steps(self) -> Iterable[tuple[str, Any]]:
        """Yield (name, file to append to) in order; headers go before the first tensor."""
        for index, names in enumerate(self._files):
            if index < len(self._whole):
                continue
            path = self._folder / self._file_name(index)
            with writing(path), path.open("wb") as file:
                file.write(self._header(names))
                for name in names:
                    yield name, file
                file.flush()
                os.fsync(file.fileno())
            if self._resume:
                self._whole.append({name: self.hashes[name] for name in names})
                journal = {"of": self._resume, "files": self._whole}
                write_text_atomically(self._folder / JOURNAL, json.dumps(journal))

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
            file = self._folder / self._file_name(index)
            size = len(self._header(names)) + sum(self._bytes(name) for name in names)
            if not file.is_file() or file.stat().st_size != size:
                return journal["files"][:index]
        return journal["files"]

    def _header(self, names: Iterable[str]) -> bytes:
        return _header({name: self._shapes[name] for name in names}, self._dtype)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the planned order, of its planned shape."""
        assert tuple(tensor.shape) == self._shapes[name], f"{name}: shape {tuple(tensor.shape)}"
        self.write_blocks(name, [tensor])

    def write_blocks(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Append the next tensor of the planned order, given as rows one after the other.

        A block is written before the next one is asked for, but hashed up to some pieces later:
        blocks must not share memory that is written again.
        """
        file, left = self._next(name), self._bytes(name)
        digest = hashlib.sha256()
        for block in blocks:
            data = _bytes_of(block.detach().to("cpu", self._dtype).contiguous())
            left -= len(data)
            for piece in _pieces(data):
                self._waiting.append(self._hasher.submit(digest.update, piece))
                with writing(Path(file.name)):
                    _append(file, piece)
                if len(self._waiting) > _WAITING:
                    self._waiting.popleft().result()
        assert left == 0, f"{name}: {left} bytes too few"
        self._digests[name] = self._hasher.submit(digest.hexdigest)

    def copy(self, name: str, stored: Stored) -> None:
        """Append the next tensor of the planned order, which lies as it is in another file.

        Raises:
            UsageError: the file is shorter than it was.
        """
        file = self._next(name)
        assert stored.size == self._bytes(name), f"{name}: {stored.size} bytes"
        file.flush()
        with stored.path.open("rb") as source, writing(Path(file.name)):
            if not _copy_range(source.fileno(), stored.offset, file.fileno(), stored.size):
                raise UsageError(f"{stored.path} was cut off while it was read: run this again")
        file.seek(0, os.SEEK_END)
        self._digests[name] = stored.sha256

    def _next(self, name: str) -> Any:
        expected, file = next(self._queue)
        assert name == expected, f"{name} written where {expected} was planned"
        return file

    def _bytes(self, name: str) -> int:
        return torch.Size(self._shapes[name]).numel() * self._dtype.itemsize

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of what was written, by name."""
        return {n: d if isinstance(d, str) else d.result() for n, d in self._digests.items()}

    def finish(self) -> None:
        """Complete the last file, and write the index."""
        self._close()
        place = {
            name: self._file_name(index)
            for index, names in enumerate(self._files)
            for name in names
        }
        (self._folder / JOURNAL).unlink(missing_ok=True)
        write_json(self._folder / INDEX, {"metadata": {}, "weight_map": place})

    def read_back(self, name: str) -> Tensor:
        """A tensor as it was written; after the last was."""
        self._close()
        (number,) = (i for i, names in enumerate(self._files) if name in names)
        # "pt" is the package's own name for torch.
        with safe_open(str(self._folder / self._file_name(number)), framework="pt") as file:
            return file.get_tensor(name)

    def _close(self) -> None:
        assert next(self._queue, None) is None, "tensors are missing"
        self._hasher.shutdown()

    def _file_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self._files):05d}.safetensors"


def _sha256_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Hex digest of a contiguous tensor's bytes."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().reshape(-1))


def _append(file: Any, piece: memoryview) -> None:
    try:
        file.write(piece)
    except OSError as error:
        if error.errno == errno.EFAULT:
            # It lies in a mapped file that was cut off: reading it here says of which
            # (config/faults.py).
            bytes(piece)
        raise


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), _PIECE_BYTES):
        yield data[start : start + _PIECE_BYTES]


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
    """The head of a safetensors file: length, then JSON padded to eight bytes."""
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
    text += b" " * (-len(text) % 8)
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
