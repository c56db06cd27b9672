"""Safetensors files written tensor by tensor, whatever their number and size."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_jam.config.files import write_json

INDEX = "model.safetensors.index.json"
"""Which file holds which tensor."""

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorStream:
    """Writes tensors in a planned order into as many files as it takes."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        file_bytes: int = 4 << 30,
    ) -> None:
        """Plan the files; the first tensor makes the first of them.

        Args:
            folder: where they are made; it must exist by then.
            shapes: shape of each tensor by name, in the order in which they will be written.
            dtype: of all tensors.
            file_bytes: largest size of one file, in bytes, unless one tensor is larger.
        """
        self._folder, self._dtype, self._shapes = folder, dtype, dict(shapes)
        self._files = _plan(self._shapes, dtype.itemsize, file_bytes)
        self._queue = iter(self._steps())
        self.hashes: dict[str, str] = {}
        """sha256 of what was written, by name."""

    def _steps(self) -> Iterable[tuple[str, Any]]:
        """Yield (name, file to append to) in order; headers go before the first tensor."""
        for index, names in enumerate(self._files):
            with (self._folder / self._file_name(index)).open("wb") as file:
                file.write(_header({n: self._shapes[n] for n in names}, self._dtype))
                for name in names:
                    yield name, file
                file.flush()
                os.fsync(file.fileno())

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the planned order, of its planned shape."""
        expected, file = next(self._queue)
        assert name == expected, f"{name} written where {expected} was planned"
        assert tuple(tensor.shape) == self._shapes[name], f"{name}: shape {tuple(tensor.shape)}"
        data = tensor.detach().to("cpu", self._dtype).contiguous()
        self.hashes[name] = tensor_sha256(data)
        file.write(_bytes_of(data))

    def finish(self) -> None:
        """Complete the last file, and write the index."""
        self._close()
        place = {
            name: self._file_name(index)
            for index, names in enumerate(self._files)
            for name in names
        }
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

    def _file_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self._files):05d}.safetensors"


def tensor_sha256(tensor: Tensor) -> str:
    """Hex digest of a contiguous tensor's bytes."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().reshape(-1))


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
