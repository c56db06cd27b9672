"""The weights folder: the hub that every converter, fusion and training run reads and writes.

    config.json  vocabulary.json  tokenizer.json  provenance.json
    model-00001-of-0000n.safetensors  model.safetensors.index.json

One tensor for each logical weight under its canonical name; never fused, sharded or padded.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import (
    PartFolder,
    Unchanged,
    check_replaceable,
    read_json,
    replace_folder,
    write_json,
    writing,
)
from megatron_jam.config.model import ModelConfig
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.stream import INDEX, Fill, TensorStream
from megatron_jam.weights.tensor_file import DTYPES, Stored, read_header, read_index

CONFIG, VOCABULARY, TOKENIZER = "config.json", "vocabulary.json", "tokenizer.json"
PROVENANCE = "provenance.json"
HUGGING_FACE = "tokenizer_config.json"
"""Which an exported model has, and a weights folder has not."""
DTYPE, SHA256, FILES_SHA256 = "dtype", "sha256", "files_sha256"
"""What its writer adds to provenance.json: dtype of the tensors, sha256 of each, and of each small
file."""


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
        self.config = _config(self.path / CONFIG)
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
        self.provenance = read_json(self.path / PROVENANCE)
        self._files: dict[str, Any] = {}
        self._headers: dict[Path, dict[str, tuple[int, int]]] = {}
        self._place = read_index(self.path / INDEX)
        self.unchanged = Unchanged(self.path / name for name in sorted(set(self._place.values())))
        """Check it when all was read: another program may have written the files meanwhile."""

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._place)

    @property
    def files(self) -> dict[str, set[str]]:
        """Names of the tensors in each file, by the file's name, as the index says."""
        found: dict[str, set[str]] = {}
        for name, file in self._place.items():
            found.setdefault(file, set()).add(name)
        return found

    def copy_description(self, path: Path) -> None:
        """Make a folder `path` with what the weights are of: config, vocabulary, tokenizer."""
        path.mkdir(parents=True)
        for name in (CONFIG, VOCABULARY, TOKENIZER):
            shutil.copyfile(self.path / name, path / name)

    @property
    def tokenizer_path(self) -> Path:
        """The text tokenizer's file."""
        return self.path / TOKENIZER

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """One tensor, whole or cut along `dim`.

        Raises:
            UsageError: if the folder has no tensor of that name, or its file does not give it.
        """
        if name not in self._place:
            raise UsageError(f"{self.path} has no tensor {name}")
        file = self._place[name]
        if file not in self._files:
            self._files[file] = self._open(file, name)
        try:
            if dim is None:
                return self._files[file].get_tensor(name)
            view = self._files[file].get_slice(name)
            return view[start:stop] if dim == 0 else view[:, start:stop]
        except (SafetensorError, IndexError) as error:  # or one number, which has no rows
            raise UsageError(
                f"{self.path / file} does not give {name} ({error}): copy the whole folder"
            ) from error

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
    def dtype(self) -> torch.dtype:
        """Of the first tensor; all have one.

        Raises:
            UsageError: it is not one of weights.
        """
        found = self.read(self.names[0], 0, 0, 0).dtype
        if found not in DTYPES:
            raise UsageError(f"{self.path}: {self.names[0]} is {found}, quantised or no weight")
        return found

    def stored(self, name: str) -> Stored:
        """Where a tensor's bytes lie.

        Raises:
            UsageError: the file does not give it, or nobody recorded its sha256.
        """
        self.shape(name)  # a file that is missing or damaged is told of there
        path = self.path / self._place[name]
        if path not in self._headers:
            self._headers[path] = read_header(path)
        start, stop = self._headers[path][name]
        return Stored(path=path, offset=start, size=stop - start, sha256=self.hashes[name])

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of each tensor as it was written, by name.

        Raises:
            UsageError: provenance.json lacks one.
        """
        found = self.provenance.get(SHA256)
        given = found if isinstance(found, dict) else {}
        for name in self.names:
            if not isinstance(given.get(name), str):
                raise UsageError(
                    f"{self.path}: {PROVENANCE} has no sha256 of {name}: make or copy the folder"
                    " again"
                )
        return given

    @property
    def sha256(self) -> str:
        """Of all tensors: the hash of their recorded hashes; raises as `hashes`."""
        recorded = json.dumps(self.hashes, sort_keys=True)
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
        source: Path | Mapping[str, bytes],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        file_bytes: int = 4 << 30,
        resume: str = "",
    ) -> None:
        """Plan the files.

        Args:
            path: the folder to make; one that is there is replaced at the end.
            config: the model's description.
            source: folder that holds vocabulary.json and tokenizer.json to copy, or their bytes by
                name, and those of other small files.
            shapes: shape of each tensor by name, in the order in which they will lie.
            dtype: of all tensors.
            file_bytes: largest size of one file, in bytes, unless one tensor is larger.
            resume: what all the tensors are made of, in short: an interrupted writer of the same
                leaves its part of the folder, and this one goes on there. "" leaves nothing.

        Raises:
            UsageError: if `source` lacks a file, or `path` is another kind of folder.
        """
        check_output(Path(path))
        self._beside = tokenizer_files(source) if isinstance(source, Path) else source
        self.path = Path(path)
        self._making = PartFolder(self.path)
        self._part = self._making.path
        self._config, self._dtype, self._resume = config, dtype, resume
        self._stream = TensorStream(self._part, shapes, dtype, file_bytes=file_bytes, resume=resume)
        self._is_complete = False
        self.left = list(shapes)
        """Names of what is to be written, in order: all, or what an interrupted writer left."""

    def __enter__(self) -> "FolderWriter":
        self._making.open()
        whole, self.left = self.left, self._stream.go_on()
        if self.left == whole:
            self._making.clear()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        # Renamed and gone where all went well. A wrong input will not be right the next time.
        self._making.close(keep=bool(self._resume and error and not isinstance(error, UsageError)))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of its planned shape."""
        self._stream.write(name, tensor)

    def write_together(self, tensors: Mapping[str, Fill]) -> None:
        """Write tensors together, given by what writes their rows into a buffer."""
        self._stream.write_together(tensors)

    def copy(self, name: str, stored: Stored) -> None:
        """Write a tensor that lies as it is in another folder."""
        self._stream.copy(name, stored)

    def read_back(self, name: str) -> Tensor:
        """A tensor as it was written; after the last was."""
        return self._stream.read_back(name)

    def complete(self, provenance: Mapping[str, Any]) -> WeightsFolder:
        """Write the small files, and open the folder, which has not its name yet."""
        self._stream.finish()
        with writing(self._part):
            self._config.save(self._part / CONFIG)
            for name, content in self._beside.items():
                (self._part / name).write_bytes(content)
        self._save(provenance)
        self._is_complete = True
        return WeightsFolder(self._part)

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Write the small files, if they are not yet, and rename the folder to its name."""
        if not self._is_complete:
            self.complete(provenance)
        self._save(provenance)
        check_output(self.path)
        replace_folder(self._part, self.path, marker=PROVENANCE)

    def _save(self, provenance: Mapping[str, Any]) -> None:
        small = {name: file_sha256(self._part / name) for name in (CONFIG, *self._beside)}
        written = {
            DTYPE: str(self._dtype).removeprefix("torch."),
            FILES_SHA256: small,
            SHA256: self._stream.hashes,
        }
        write_json(self._part / PROVENANCE, {**provenance, **written})


def check_output(path: Path) -> None:
    """Raise UsageError unless a weights folder can be written to `path`: call before work starts.

    What may stand there is an empty folder or an older weights folder.
    """
    check_replaceable(path, PROVENANCE)
    if (path / HUGGING_FACE).exists():
        raise UsageError(f"{path} is not replaced, as it is a model of Hugging Face: name another")


def _config(path: Path) -> ModelConfig:
    """A model's description; UsageError if it is none, with the file's name."""
    values = read_json(path)
    if "model_type" in values:
        raise UsageError(
            f"{path.parent} is a model of Hugging Face, no weights folder: make one of it with"
            " tools/convert_hf.py import"
        )
    try:
        return ModelConfig.from_dict(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's vocabulary.json and tokenizer.json, by name.

    Raises:
        UsageError: one is missing.
    """
    for name in (VOCABULARY, TOKENIZER):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}: name the folder of a text tokenizer")
    return {name: (folder / name).read_bytes() for name in (VOCABULARY, TOKENIZER)}
