"""Whether a weights folder is still what was written."""

from pathlib import Path
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.weights.folder import (
    CONFIG,
    DTYPE,
    FILES_SHA256,
    PROVENANCE,
    TOKENIZER,
    VOCABULARY,
    WeightsFolder,
    file_sha256,
)
from megatron_jam.weights.load import check_tensors
from megatron_jam.weights.stream import INDEX, tensor_sha256
from megatron_jam.weights.tensor_file import read_header

_AGAIN = "make or copy it again"


def verify(path: Path) -> int:
    """Check index, shapes, dtype, and the hash of every tensor and every small file.

    A folder whose writer did not record dtype and small files yet is checked without, which is
    said.

    Returns:
        How many tensors there are.

    Raises:
        UsageError: something is missing, unknown or changed; the message names it.
    """
    folder = WeightsFolder(path)
    check_tensors(folder)
    _check_index(folder)
    _check_small_files(folder)
    dtype = folder.provenance.get(DTYPE, _name(folder.dtype))
    if unknown := sorted(set(folder.hashes) - set(folder.names)):
        raise UsageError(f"{path} lacks {unknown[0]}, whose sha256 {PROVENANCE} has: {_AGAIN}")
    for name in folder.names:
        tensor, due = folder.read(name), folder.hashes[name]
        if _name(tensor.dtype) != dtype:
            raise UsageError(f"{path}: {name} is {_name(tensor.dtype)}, not {dtype}: {_AGAIN}")
        if tensor_sha256(tensor) != due:
            raise UsageError(f"{path}: {name} is not what was written, by its sha256: {_AGAIN}")
    if FILES_SHA256 not in folder.provenance:
        logger.info(
            "%s: %s is of an older version, without dtype and sha256 of the small files: changes of"
            " those are not seen",
            path,
            PROVENANCE,
        )
    return len(folder.names)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _check_index(folder: WeightsFolder) -> None:
    """Raise UsageError if the files hold what the index lacks; the converse shows on reading."""
    files = folder.files
    for path in sorted(folder.path.glob("*.safetensors")):
        if path.name not in files:
            raise UsageError(f"{path} is a file that {INDEX} lacks: remove it")
        if unknown := sorted(set(read_header(path)) - files[path.name]):
            raise UsageError(f"{path} holds {unknown[0]}, which {INDEX} lacks: {_AGAIN}")


def _check_small_files(folder: WeightsFolder) -> None:
    """Raise UsageError unless config, vocabulary, tokenizer and what lies beside are as written."""
    if FILES_SHA256 not in folder.provenance:
        TextTokenizer.load(folder.tokenizer_path)
        return
    recorded = folder.provenance[FILES_SHA256]
    given = recorded if isinstance(recorded, dict) else {}
    for name in sorted({CONFIG, VOCABULARY, TOKENIZER, *given}):
        path = folder.path / name
        if name not in given:
            raise UsageError(f"{folder.path}: {PROVENANCE} has no sha256 of {name}: {_AGAIN}")
        if not path.is_file():
            raise UsageError(f"{path} is missing: copy the whole folder")
        if file_sha256(path) != given[name]:
            raise UsageError(f"{path} is not what was written, by its sha256: {_AGAIN}")
