"""Prepared sets: PREFIX.bin and PREFIX.idx in Megatron's format, and PREFIX.json that says of what.

One sequence is one document, but for pairs with retrieved ones, which are sequences of their own.
The ids are stored in the narrowest dtype that holds them. PREFIX.json is written last: where it
stands, the set is whole.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.data import RetrievedConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, read_json, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.data.index_file import DTYPES, Index, TokenWriter, map_tokens, read_index
from megatron_jam.ops.extension import Retrieval
from megatron_jam.tokenizers.vocabulary import IMAGE, SPECIAL, TEXT, JointVocabulary

Kind = Literal["text", "pairs", "interleaved"]


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

    sha256: dict[str, str]
    """Checksums of the files: "bin" and "idx"."""

    settings: dict[str, Any] = field(default_factory=dict)
    """What the tool that made the set was told, for sets that are merged must agree in it."""


class IndexedSet:
    """A set on disk, memory-mapped: documents 0 .. num_documents - 1 in the order of writing."""

    def __init__(self, prefix: str, info: SetInfo, index: Index) -> None:
        """Use :func:`open_set`."""
        self.prefix = prefix
        self.info = info
        self.dtype = index.dtype
        """Of the ids in the file."""
        self.lengths = index.lengths
        """Tokens of each document, int32 or int64 [num_documents]."""
        self.starts = index.starts
        """First token of each document in the file, int64 [num_documents]."""
        self.sequences = index.sequences
        """Of documents that consist of several: retrieved ones stand between its first and last."""
        self.all_tokens: NDArray[np.integer] = map_tokens(prefix, index.dtype)
        """Every document in a row, in the dtype of the file, read-only, [num_tokens]."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.all_tokens)

    @property
    def sequence_lengths(self) -> NDArray[np.integer]:
        """Tokens of each sequence, [num_sequences]."""
        return self.lengths if self.sequences is None else np.diff(self.sequences.edges)

    @property
    def sequence_counts(self) -> NDArray[np.integer]:
        """Sequences of each document, [num_documents]."""
        if self.sequences is None:
            return np.ones(self.num_documents, dtype=np.int32)
        return np.diff(self.sequences.borders)

    def retrieval(self, config: RetrievedConfig | None) -> Retrieval | None:
        """How the retrieved documents of :attr:`sequences` are drawn; None if all are laid out.

        Raises:
            UsageError: the set holds none.
        """
        if config is None:
            return None
        if self.info.kind != "pairs" or self.sequence_counts.max(initial=0) < 3:
            raise UsageError(
                f"{self.prefix} holds no retrieved pairs: leave out data.sets' retrieved, or "
                "prepare the set with --retrieved"
            )
        return Retrieval(*self.sequences, most=config.most, drawn=config.number == "drawn")

    def layout(self) -> Sequence[NDArray]:
        """What says where documents and their sequences are."""
        return [self.lengths, *(self.sequences or ())]

    def document(self, number: int, start: int = 0, stop: int | None = None) -> NDArray:
        """Tokens [start:stop] of a document in the dtype of the file, read-only, not copied."""
        first = int(self.starts[number])
        length = int(self.lengths[number])
        stop = length if stop is None else min(stop, length)
        return self.all_tokens[first + start : first + stop]


class SetWriter:
    """Writes the set PREFIX document by document in constant memory; used in a `with` statement.

    An older set of the name stays until :meth:`finish`. A block that ends without it, or is killed,
    leaves no set, and nothing but temporary files, which the next writer of the name overwrites.
    """

    def __init__(
        self,
        prefix: Path | str,
        *,
        vocabulary: JointVocabulary,
        tokenizer_sha256: str,
        kind: Kind,
        image_tokenizer_sha256: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Begin a set; the arguments are :class:`SetInfo`'s."""
        self._prefix = Path(prefix)
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self._vocabulary = vocabulary
        self._described: dict[str, Any] = {
            "vocabulary_sha256": vocabulary.sha256,
            "tokenizer_sha256": tokenizer_sha256,
            "image_tokenizer_sha256": image_tokenizer_sha256,
            "kind": kind,
            "settings": settings or {},
        }
        self._files = TokenWriter(prefix, narrowest_dtype(vocabulary, kind))
        self._num_ids = min(np.iinfo(self._files.dtype).max + 1, vocabulary.size)
        self._counts = np.zeros(3, dtype=np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._files.discard()  # after finish there is nothing left of it

    def add(
        self,
        tokens: NDArray[np.integer],
        lengths: NDArray[np.integer] | None = None,
        counts: NDArray[np.integer] | None = None,
    ) -> None:
        """Append documents that stand in a row; the arguments are :meth:`TokenWriter.add`'s.

        Raises:
            ValueError: one is empty, or has an id outside of the vocabulary or of the set's dtype.
        """
        number = self._files.num_documents
        sizes = np.array([len(tokens)]) if lengths is None else lengths
        if len(sizes) and not sizes.min() > 0:
            place = int(np.argmin(sizes))
            if counts is not None:
                place = int(np.searchsorted(np.cumsum(counts), place, side="right"))
            raise ValueError(f"document {number + place} is empty")
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._num_ids:
            is_one = len(sizes if counts is None else counts) == 1
            later = "" if is_one else " or a later one"
            raise ValueError(f"document {number}{later} leaves 0..{self._num_ids - 1}")
        self._files.add(tokens, lengths, counts)
        self._counts += count_modalities(tokens, self._vocabulary)

    def finish(self) -> SetInfo:
        """Complete the set and give it its name, replacing an older one.

        Raises:
            UsageError: there is no document.
            ValueError: there are picture codes without an `image_tokenizer_sha256`.
        """
        prefix = self._prefix
        if not self._files.num_documents:
            raise UsageError(f"{prefix}: there is no document to write")
        if self._counts[IMAGE] and not self._described["image_tokenizer_sha256"]:
            raise ValueError(f"{prefix} has pictures: say of which image tokenizer")
        sha256 = self._files.finish()
        # From here to the end the set is not whole.
        Path(f"{prefix}.json").unlink(missing_ok=True)
        for name, path in self._files.paths.items():
            publish(path, Path(f"{prefix}.{name}"))
        info = SetInfo(
            **self._described,
            num_documents=self._files.num_documents,
            num_tokens=self._files.num_tokens,
            tokens_by_modality=by_modality(self._counts),
            sha256=sha256,
        )
        write_info(prefix, info)
        return info


def write_set(
    prefix: Path | str,
    documents: Iterable[NDArray[np.int64] | Sequence[NDArray[np.int64]]],
    *,
    vocabulary: JointVocabulary,
    tokenizer_sha256: str,
    kind: Kind,
    image_tokenizer_sha256: str = "",
    settings: dict[str, Any] | None = None,
) -> SetInfo:
    """Write `documents`, joint ids [n] or a row of sequences of such, as the set PREFIX, replacing
    an older one.

    Raises:
        UsageError: there is no document.
        ValueError: a document is empty or has an id outside the vocabulary, or there are picture
            codes without an `image_tokenizer_sha256`.
    """
    with SetWriter(
        prefix,
        vocabulary=vocabulary,
        tokenizer_sha256=tokenizer_sha256,
        kind=kind,
        image_tokenizer_sha256=image_tokenizer_sha256,
        settings=settings,
    ) as writer:
        for each in documents:
            sequences = [each] if isinstance(each, np.ndarray) else each
            lengths = np.array([len(tokens) for tokens in sequences])
            writer.add(np.concatenate(sequences), lengths, np.array([len(sequences)]))
        return writer.finish()


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
    opened = IndexedSet(str(prefix), info, read_index(prefix))
    found = opened.num_documents, opened.num_tokens
    if found != (info.num_documents, info.num_tokens):
        raise UsageError(f"{prefix}.idx and {prefix}.json differ: prepare the set again")
    return opened


def read_info(prefix: Path | str) -> SetInfo:
    """The content of PREFIX.json; :class:`UsageError` if it is missing or wrong."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        raise UsageError(f"no prepared set at {prefix}, {path} is missing: run tools/prepare_*.py")
    try:
        info = SetInfo(**read_json(path))
    except (UsageError, TypeError) as error:
        raise UsageError(
            f"{path} does not describe a prepared set ({error}): prepare the set again"
        ) from error
    if info.kind not in get_args(Kind):
        raise UsageError(f"{path}: kind {info.kind!r} is not one of {get_args(Kind)}")
    return info


def narrowest_dtype(vocabulary: JointVocabulary, kind: Kind) -> np.dtype:
    """The smallest of Megatron's dtypes for the ids of a set: those of texts and `</s>`, or all."""
    ids = max(vocabulary.text.stop, vocabulary.eos + 1) if kind == "text" else vocabulary.size
    unsigned = (dtype for dtype in DTYPES.values() if dtype.kind == "u")
    fitting = (each for each in unsigned if ids <= np.iinfo(each).max + 1)
    return min(fitting, key=lambda each: each.itemsize, default=np.dtype(np.int32))


def count_modalities(tokens: NDArray[np.integer], vocabulary: JointVocabulary) -> NDArray[np.int64]:
    """How many of the ids are TEXT, IMAGE and SPECIAL, int64 [3]."""
    return np.bincount(vocabulary.modality[tokens], minlength=3)


def by_modality(counts: NDArray[np.int64]) -> dict[str, int]:
    """Counts of :func:`count_modalities` as PREFIX.json has them."""
    names = {TEXT: "text", IMAGE: "image", SPECIAL: "special"}
    return {names[modality]: int(counts[modality]) for modality in names}


def write_info(prefix: Path | str, info: SetInfo) -> None:
    """Write PREFIX.json, which makes the set whole."""
    text = json.dumps(dataclasses.asdict(info), indent=2) + "\n"
    write_text_atomically(f"{prefix}.json", text)
    logger.info("%s: %d documents, tokens %s", prefix, info.num_documents, info.tokens_by_modality)
