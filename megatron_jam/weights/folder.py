"""The weights folder: the hub that every converter, fusion and training run reads and writes.

    config.json  vocabulary.json  tokenizer.json  provenance.json
    model-00001-of-0000n.safetensors  model.safetensors.index.json

One tensor for each logical weight under its canonical name; never fused, sharded or padded.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_replaceable, replace_folder
from megatron_jam.config.model import ModelConfig
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary

CONFIG, VOCABULARY, TOKENIZER = "config.json", "vocabulary.json", "tokenizer.json"
PROVENANCE, INDEX = "provenance.json", "model.safetensors.index.json"

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


class WeightsFolder:
    """A weights folder opened for reading; tensors stay memory-mapped on disk."""

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises:
            UsageError: if it is no whole weights folder, or its vocabulary does not match.
        """
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise UsageError(f"{path} is not a weights folder: it has no {INDEX}")
        self.config = ModelConfig.from_dict(_read_json(self.path / CONFIG))
        self.vocabulary = JointVocabulary.load(self.path / VOCABULARY)
        if self.vocabulary.size != self.config.vocab_size:
            raise UsageError(
                f"{path}: {VOCABULARY} has {self.vocabulary.size} ids, but {CONFIG} says vocab_size"
                f" {self.config.vocab_size}; take both from the same model"
            )
        if len(self.config.readers) > 1 and self.config.text_ids != list(self.vocabulary.text):
            raise UsageError(
                f"{path}: {CONFIG} says text_ids {self.config.text_ids}, but {VOCABULARY} has"
                f" {list(self.vocabulary.text)}; take both from the same model"
            )
        self.provenance = _read_json(self.path / PROVENANCE)
        self._files: dict[str, Any] = {}
        self._place = _read_json(self.path / INDEX).get("weight_map", {})

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._place)

    @property
    def tokenizer_path(self) -> Path:
        """The text tokenizer's file."""
        return self.path / TOKENIZER

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """One tensor, whole or cut along `dim`.

        Raises:
            UsageError: if the folder has no tensor of that name.
        """
        if name not in self._place:
            raise UsageError(f"{self.path} has no tensor {name}")
        file = self._place[name]
        if file not in self._files:
            self._files[file] = self._open(file, name)
        if dim is None:
            return self._files[file].get_tensor(name)
        view = self._files[file].get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def _open(self, file: str, name: str) -> Any:
        """Map a file, which must hold tensor `name`."""
        path = self.path / file
        if not path.is_file():
            raise UsageError(f"{path} is missing, which holds {name}: copy the whole folder")
        try:
            # "pt" is the package's own name for torch.
            opened = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged ({error}): copy the folder again") from error
        return opened

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        self.read(name, 0, 0, 0)
        return tuple(self._files[self._place[name]].get_slice(name).get_shape())

    @property
    def sha256(self) -> str:
        """Of all tensors: the hash of their recorded hashes."""
        recorded = json.dumps(self.provenance["sha256"], sort_keys=True)
        return hashlib.sha256(recorded.encode()).hexdigest()

    @property
    def image_tokenizer_sha256(self) -> str:
        """Of the image tokenizer whose codes these weights know; "" if they have seen none."""
        return self.provenance.get("image_tokenizer_sha256", "")

    def require_tokenizer(self, sha256: str, whose: str) -> None:
        """Raise UsageError unless `sha256` is of the text tokenizer that these weights know."""
        if sha256 != TextTokenizer.load(self.tokenizer_path).sha256:
            raise UsageError(
                f"the text tokenizer of {whose} is not the one of {self.path}; prepare it with"
                f" {self.tokenizer_path}"
            )

    def require_vocabulary(self, vocabulary: JointVocabulary, whose: str) -> None:
        """Raise UsageError unless `vocabulary` is the one these weights were made with."""
        if vocabulary.sha256 != self.vocabulary.sha256:
            raise UsageError(
                f"the vocabulary of {whose} is not the one of {self.path}; prepare it with"
                f" {self.path / VOCABULARY}"
            )


class FolderWriter:
    """Writes a weights folder tensor by tensor; it appears under its name only when it is whole."""

    def __init__(
        self,
        path: Path,
        *,
        config: ModelConfig,
        source: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        file_bytes: int = 4 << 30,
    ) -> None:
        """Plan the files.

        Args:
            path: the folder to make; one that is there is replaced at the end.
            config: the model's description.
            source: folder that holds vocabulary.json and tokenizer.json to copy.
            shapes: shape of each tensor by name, in the order in which they will be written.
            dtype: of all tensors.
            file_bytes: largest size of one file, in bytes, unless one tensor is larger.

        Raises:
            UsageError: if `source` lacks a file, or `path` is another kind of folder.
        """
        check_replaceable(Path(path), INDEX)
        for name in (VOCABULARY, TOKENIZER):
            if not (source / name).is_file():
                raise UsageError(f"{source} has no {name}: name the folder of a text tokenizer")
        self.path = Path(path)
        self._part = self.path.parent / f".{self.path.name}.part"
        self._config, self._source = config, Path(source)
        self._dtype, self._shapes = dtype, dict(shapes)
        self._files = _plan(self._shapes, dtype.itemsize, file_bytes)
        self._hashes: dict[str, str] = {}

    def __enter__(self) -> "FolderWriter":
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._queue = iter(self._steps())
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._part, ignore_errors=True)  # renamed and gone where all went well

    def _steps(self) -> Iterable[tuple[str, Any]]:
        """Yield (name, file to append to) in order; headers go before the first tensor."""
        for index, names in enumerate(self._files):
            with (self._part / self._file_name(index)).open("wb") as file:
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
        self._hashes[name] = tensor_sha256(data)
        file.write(_bytes_of(data))

    def read_back(self, name: str) -> Tensor:
        """A tensor as it was written; after the last was."""
        assert next(self._queue, None) is None, "tensors are missing"
        (number,) = (i for i, names in enumerate(self._files) if name in names)
        # "pt" is the package's own name for torch.
        with safe_open(str(self._part / self._file_name(number)), framework="pt") as file:
            return file.get_tensor(name)

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Write the small files and rename the folder to its name."""
        assert next(self._queue, None) is None, "tensors are missing"
        place = {
            name: self._file_name(index)
            for index, names in enumerate(self._files)
            for name in names
        }
        self._config.save(self._part / CONFIG)
        for name in (VOCABULARY, TOKENIZER):
            shutil.copyfile(self._source / name, self._part / name)
        _write_json(self._part / PROVENANCE, {**provenance, "sha256": self._hashes})
        _write_json(self._part / INDEX, {"metadata": {}, "weight_map": place})
        replace_folder(self._part, self.path, marker=INDEX)

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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object")
    return values


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
