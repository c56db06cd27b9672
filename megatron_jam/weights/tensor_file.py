"""One safetensors file: its head, and tensors that are written to it in any order; the index of
several."""

import errno
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, writing

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Of weights, and their names in a safetensors file."""
_LINE_BYTES = 64
"""Of the cache."""


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


class TensorFile:
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
        with (
            stored.path.open("rb") as source,
            writing(self._path),
            # Its own place in the file: others may be copied meanwhile.
            self._path.open("r+b", buffering=0) as target,
        ):
            target.seek(self._places[name])
            if not _copy_range(source.fileno(), stored.offset, target.fileno(), stored.size):
                raise UsageError(f"{stored.path} was cut off while it was read: run this again")

    def close(self) -> None:
        """Have it on the disk."""
        with writing(self._path):
            os.fsync(self._file)
        self.release()

    def release(self) -> None:
        """Close it as it is."""
        os.close(self._file)


def _copy_range(source: int, offset: int, target: int, size: int) -> bool:
    """Copy within the kernel, from `offset` of one file to the place of the other; whether the
    first had so much."""
    while size:
        done = os.sendfile(target, source, offset, size)
        if not done:
            return False
        offset, size = offset + done, size - done
    return True


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file: length, then JSON padded to whole lines of the cache."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[dtype],
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


def read_index(path: Path) -> dict[str, str]:
    """Which file holds each tensor, by the tensor's name, as an index says.

    Raises:
        UsageError: it does not say so, or names no tensor.
    """
    found = read_json(path).get("weight_map")
    files = list(found.values()) if isinstance(found, dict) else []
    if not files or not all(
        isinstance(each, str) and Path(each).name == each and "\0" not in each for each in files
    ):
        raise UsageError(
            f"{path} is damaged: its weight_map does not give each tensor's file in its folder"
        )
    assert isinstance(found, dict)
    return found
