"""Safetensors files written tensor by tensor, whatever their number and size."""

import errno
import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from megatron_jam.ops.sha256 import Sha256

INDEX = "model.safetensors.index.json"
"""Which file holds which tensor."""
JOURNAL = "journal.json"
"""Which files of an unfinished folder are whole, and of what they were made."""

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE_BYTES = 2 << 20
"""Written at once: small enough to be still in the cache when it is hashed."""
_WAITING_BYTES = 8 << 20
"""Of pieces that may wait for their hash."""


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
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hasher")
        self._waiting: deque[tuple[Future, int]] = deque()
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
        """Write a tensor of its planned shape."""
        assert tuple(tensor.shape) == self._shapes[name], f"{name}: shape {tuple(tensor.shape)}"
        self.write_together({name: [tensor]})

    def write_together(self, tensors: Mapping[str, Iterable[Tensor]]) -> None:
        """Write tensors of one shape, given as blocks of rows one after the other, side by side:
        many are hashed faster together.

        A block is written before the next one is asked for, but hashed some pieces later: blocks
        must not share memory that is written again. Blocks of all have the same sizes.
        """
        (size,) = {self._bytes(name) for name in tensors}
        files = {name: self._file_of(name) for name in tensors}
        sources = {name: self._pieces(blocks) for name, blocks in tensors.items()}
        digest, done = Sha256(len(tensors)), 0
        while done < size:
            pieces = []
            for name, source in sources.items():
                piece = next(source, memoryview(b""))
                assert 0 < len(piece) <= size - done, f"{name}: {size - done} bytes are left"
                files[name].write(name, done, piece)
                pieces.append(piece)
            done += len(pieces[0])
            self._hash(digest, pieces)
        for name, source in sources.items():
            assert next(source, None) is None, f"{name}: more than {size} bytes"
        found = self._hasher.submit(digest.hexdigests)
        for place, name in enumerate(tensors):
            self._finish(name, self._hasher.submit(lambda i=place: found.result()[i]))

    def _pieces(self, blocks: Iterable[Tensor]) -> Iterator[memoryview]:
        """The bytes of rows."""
        for block in blocks:
            data = _bytes_of(block.detach().to("cpu", self._dtype).contiguous())
            for start in range(0, len(data), _PIECE_BYTES):
                yield data[start : start + _PIECE_BYTES]

    def _hash(self, digest: Sha256, pieces: Sequence[memoryview]) -> None:
        self._waiting.append((self._hasher.submit(digest.update, pieces), sum(map(len, pieces))))
        while len(self._waiting) > 1 and sum(n for _, n in self._waiting) > _WAITING_BYTES:
            self._waiting.popleft()[0].result()

    def copy(self, name: str, stored: Stored) -> None:
        """Write a tensor that lies as it is in another file.

        Raises:
            UsageError: the file is shorter than it was.
        """
        assert stored.size == self._bytes(name), f"{name}: {stored.size} bytes"
        file = self._file_of(name)
        with stored.path.open("rb") as source:
            if not file.copy(name, source.fileno(), stored):
                raise UsageError(f"{stored.path} was cut off while it was read: run this again")
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
        self._hasher.shutdown(cancel_futures=True)
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

    def copy(self, name: str, source: int, stored: Stored) -> bool:
        """Copy a tensor within the kernel; whether the other file had so much."""
        with writing(self._path):
            os.lseek(self._file, self._places[name], os.SEEK_SET)
            return _copy_range(source, stored.offset, self._file, stored.size)

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


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().reshape(-1))


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
