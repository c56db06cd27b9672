"""Prepared sets: PREFIX.bin and PREFIX.idx in Megatron's format, and PREFIX.json that says of what.

One sequence is one document. The ids are stored in the narrowest dtype that holds the vocabulary.
PREFIX.json is written last: where it stands, the set is whole.
"""

import dataclasses
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, temporary_name, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.tokenizers.vocabulary import IMAGE, SPECIAL, TEXT, JointVocabulary

Kind = Literal["text", "pairs", "interleaved"]

_IDX_MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype code, number of sequences, number of documents + 1; not aligned.
_HEADER = struct.Struct("<9sQBQQ")


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """The content of PREFIX.json."""

    vocabulary_sha256: str
    """`JointVocabulary.sha256` of the ids."""

    tokenizer_sha256: str
    """`TextTokenizer.sha256` of the texts."""

    image_tokenizer_sha256: str
    """`ImageTokenizer.sha256` of the picture codes; empty without pictures."""

    kind: Kind
    """text: texts; pairs: captions with images; interleaved: questions and answers."""

    num_documents: int
    """Documents in the set."""

    num_tokens: int
    """Tokens in the set."""

    tokens_by_modality: dict[str, int]
    """`num_tokens` by text, image and special."""


class IndexedSet:
    """A set on disk, memory-mapped: documents 0 .. num_documents - 1 in the order of writing."""

    def __init__(self, prefix: str, info: SetInfo, index: IndexedDataset) -> None:
        """Use :func:`open_set`."""
        self.prefix = prefix
        self.info = info
        self.lengths: NDArray[np.int32] = index.sequence_lengths
        """Tokens of each document, int32 [num_documents]."""
        dtype = np.dtype(index.index.dtype)
        self._starts = index.index.sequence_pointers // dtype.itemsize
        # A plain array over the map: slices of np.memmap itself cost ten times as much.
        self._tokens = np.asarray(np.memmap(f"{prefix}.bin", dtype=dtype, mode="r"))
        self._index = index  # owns the memory of lengths

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def document(self, number: int, start: int = 0, stop: int | None = None) -> NDArray:
        """Tokens [start:stop] of a document in the dtype of the file, read-only, not copied."""
        first = int(self._starts[number])
        length = int(self.lengths[number])
        stop = length if stop is None else min(stop, length)
        return self._tokens[first + start : first + stop]

    def tokens(self, start: int, stop: int) -> NDArray:
        """Tokens [start:stop] of all documents in a row, in the dtype of the file, not copied."""
        return self._tokens[start:stop]


def write_set(
    prefix: Path | str,
    documents: Iterable[NDArray[np.int64]],
    *,
    vocabulary: JointVocabulary,
    tokenizer_sha256: str,
    kind: Kind,
    image_tokenizer_sha256: str = "",
) -> SetInfo:
    """Write `documents`, joint ids [n] each, as the set PREFIX, replacing an older one.

    Raises:
        UsageError: there is no document.
        ValueError: a document is empty or has an id outside the vocabulary, or there are picture
            codes without an `image_tokenizer_sha256`.
    """
    final = {name: Path(f"{prefix}.{name}") for name in ("bin", "idx", "json")}
    final["bin"].parent.mkdir(parents=True, exist_ok=True)
    temporary = {name: temporary_name(final[name]) for name in ("bin", "idx")}
    builder = IndexedDatasetBuilder(str(temporary["bin"]), dtype=narrowest_dtype(vocabulary.size))
    counts = np.zeros(3, dtype=np.int64)
    num_documents = 0
    try:
        for tokens in documents:
            if not tokens.size or not 0 <= tokens.min() <= tokens.max() < vocabulary.size:
                raise ValueError(
                    f"document {num_documents} is empty or leaves 0..{vocabulary.size - 1}"
                )
            builder.add_document(tokens, [tokens.size])
            counts += np.bincount(vocabulary.modality[tokens], minlength=len(counts))
            num_documents += 1
        if not num_documents:
            raise UsageError(f"{prefix}: there is no document to write")
        if counts[IMAGE] and not image_tokenizer_sha256:
            raise ValueError(f"{prefix} has pictures: say of which image tokenizer")
        builder.finalize(str(temporary["idx"]))
        final["json"].unlink(missing_ok=True)  # from here to the end the set is not whole
        publish(temporary["bin"], final["bin"])
        publish(temporary["idx"], final["idx"])
    except BaseException:
        builder.data_file.close()
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    text, image, special = (int(counts[modality]) for modality in (TEXT, IMAGE, SPECIAL))
    info = SetInfo(
        vocabulary_sha256=vocabulary.sha256,
        tokenizer_sha256=tokenizer_sha256,
        image_tokenizer_sha256=image_tokenizer_sha256,
        kind=kind,
        num_documents=num_documents,
        num_tokens=text + image + special,
        tokens_by_modality={"text": text, "image": image, "special": special},
    )
    write_text_atomically(final["json"], json.dumps(dataclasses.asdict(info), indent=2) + "\n")
    logger.info("%s: %d documents, tokens %s", prefix, num_documents, info.tokens_by_modality)
    return info


def open_set(prefix: Path | str, vocabulary: JointVocabulary) -> IndexedSet:
    """Open the set PREFIX for a model of `vocabulary`.

    Raises:
        UsageError: a file is missing, damaged or not a set's, or was made with another vocabulary.
    """
    info = read_info(prefix)
    if info.vocabulary_sha256 != vocabulary.sha256:
        raise UsageError(
            f"{prefix} was prepared with another vocabulary "
            f"({info.vocabulary_sha256[:12]}, not {vocabulary.sha256[:12]}): prepare it again"
        )
    for name in ("bin", "idx"):
        if not Path(f"{prefix}.{name}").is_file():
            raise UsageError(f"{prefix}.{name} is missing: prepare the set again")
    num_documents, dtype = _read_index_header(Path(f"{prefix}.idx"))
    size, due = Path(f"{prefix}.bin").stat().st_size, info.num_tokens * dtype.itemsize
    if size != due:
        raise UsageError(f"{prefix}.bin has {size} bytes, not {due}: prepare the set again")
    index = IndexedDataset(str(prefix))
    num_tokens = int(index.sequence_lengths.sum(dtype=np.int64))
    if (num_documents, num_tokens) != (info.num_documents, info.num_tokens):
        raise UsageError(f"{prefix}.idx and {prefix}.json differ: prepare the set again")
    return IndexedSet(str(prefix), info, index)


def _read_index_header(path: Path) -> tuple[int, np.dtype]:
    """The number of sequences and the tokens' dtype of an .idx file of a plausible size.

    Megatron's reader would end with a traceback, and a second one on clean-up.
    """
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_IDX_MAGIC):
        raise UsageError(f"{path} is not a Megatron index: prepare the set again")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(header)
    if version != 1 or code not in {each.value for each in DType}:
        raise UsageError(f"{path} has an unknown version or dtype: prepare the set again")
    # Lengths int32 and pointers int64 of sequences, then the documents' borders int64.
    if path.stat().st_size < _HEADER.size + num_sequences * (4 + 8) + num_documents * 8:
        raise UsageError(f"{path} is cut short: prepare the set again")
    return num_sequences, np.dtype(DType.dtype_from_code(code))


def read_info(prefix: Path | str) -> SetInfo:
    """The content of PREFIX.json; :class:`UsageError` if it is missing or wrong."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise UsageError(f"no prepared set at {prefix}, {path} is missing: run tools/prepare_*.py")
    try:
        info = SetInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{path} does not describe a prepared set ({error}): prepare the set again"
        ) from error
    if info.kind not in get_args(Kind):
        raise UsageError(f"{path}: kind {info.kind!r} is not one of {get_args(Kind)}")
    return info


def narrowest_dtype(vocabulary_size: int) -> type[np.integer]:
    """The smallest of Megatron's dtypes that holds ids below `vocabulary_size`."""
    for dtype in (np.uint8, np.uint16):
        if vocabulary_size <= np.iinfo(dtype).max + 1:
            return dtype
    return np.int32
