"""From raw files to documents: what tools/train_text_tokenizer.py and tools/prepare_*.py call.

Whatever is wrong with an input raises a :class:`UsageError` that names the file and the line (or
the record of a .tar).
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.document import (
    Part,
    caption_image_document,
    question_answer_document,
    text_document,
)
from megatron_jam.tokenizers.image import ImageTokenizer, pixels_from_image
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary

T = TypeVar("T")
Tokens = NDArray[np.int64]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class Record(NamedTuple):
    """One record of an input file."""

    where: str
    """File and line, or file and key: what an error message starts with."""

    key: str
    """Name of a .tar's record; the line number of a .jsonl's."""

    fields: dict[str, Any]
    """A line's JSON object; bytes by extension for a .tar."""


def load_text_folder(folder: Path | str) -> tuple[TextTokenizer, JointVocabulary]:
    """The tokenizer and the vocabulary that tools/train_text_tokenizer.py wrote.

    Raises:
        UsageError: one is missing, or they do not belong together.
    """
    tokenizer = TextTokenizer.load(Path(folder) / TOKENIZER_FILE)
    vocabulary = JointVocabulary.load(Path(folder) / VOCABULARY_FILE)
    if tokenizer.vocab_size != vocabulary.text.size:
        raise UsageError(
            f"{folder}: {TOKENIZER_FILE} has {tokenizer.vocab_size} ids, but {VOCABULARY_FILE} "
            f"counts {vocabulary.text.size} text ids: make them again together"
        )
    return tokenizer, vocabulary


def read_jsonl(path: Path | str) -> Iterator[Record]:
    """The objects of a .jsonl file, one a line; blank lines are skipped."""
    empty = True
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise UsageError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(fields, dict):
                raise UsageError(f"{where}: not a JSON object but {type(fields).__name__}")
            empty = False
            yield Record(where, str(number), fields)
    if empty:
        raise UsageError(f"{path} is empty")


def read_tar(path: Path | str) -> Iterator[Record]:
    """The records of a WebDataset .tar: neighbouring files of one name up to the first dot."""
    empty = True
    try:
        with tarfile.open(path) as archive:
            files = (member for member in archive if member.isfile())
            for key, members in groupby(files, key=lambda member: _key_and_extension(member)[0]):
                fields = {}
                for member in members:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a plain file
                    fields[_key_and_extension(member)[1]] = content.read()
                empty = False
                yield Record(f"{path}: record {key!r}", key, fields)
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(f"{path} is not a whole .tar file: {error}") from error
    if empty:
        raise UsageError(f"{path} is empty")


def read_texts(path: Path | str) -> Iterator[str]:
    """Every text of a file, to train a tokenizer on: "text", or question and answer, of a .jsonl's
    lines; the captions of a .tar."""
    if Path(path).suffix == ".tar":
        for record in read_tar(path):
            yield _caption(record)
    elif Path(path).suffix == ".jsonl":
        for record in read_jsonl(path):
            if "question" in record.fields:
                yield _text(record, "question")
                for part in _answer(record):
                    if "text" in part:
                        yield part["text"]
            else:
                yield _text(record, "text")
    else:
        raise UsageError(f"{path}: texts are read from .jsonl and .tar files only")


def text_documents(
    path: Path | str, *, tokenizer: TextTokenizer, vocabulary: JointVocabulary
) -> Iterator[Tokens]:
    """A text document for each line {"text": ...} of a .jsonl."""
    for record in read_jsonl(path):
        yield text_document(vocabulary, tokenizer.encode(_text(record, "text")))


def pair_documents(
    path: Path | str,
    *,
    tokenizer: TextTokenizer,
    vocabulary: JointVocabulary,
    image_tokenizer: ImageTokenizer,
    batch_size: int,
) -> Iterator[Tokens]:
    """A caption-image document for each record (.txt, and .png or .jpg) of a .tar."""
    for record, codes in _with_codes(read_tar(path), image_tokenizer, vocabulary, batch_size):
        yield caption_image_document(vocabulary, tokenizer.encode(_caption(record)), codes)


def question_answer_documents(
    path: Path | str,
    pictures: Path | str,
    *,
    tokenizer: TextTokenizer,
    vocabulary: JointVocabulary,
    image_tokenizer: ImageTokenizer,
    batch_size: int,
) -> Iterator[Tokens]:
    """A question-answer document for each line {"question": ..., "answer": [{"text": ...} or
    {"image": key}, ...]} of a .jsonl; keys are those of the .tar `pictures`."""
    records = list(read_jsonl(path))
    needed = {part["image"] for each in records for part in _answer(each) if "image" in part}
    wanted = (record for record in read_tar(pictures) if record.key in needed)
    codes_of = {
        record.key: codes
        for record, codes in _with_codes(wanted, image_tokenizer, vocabulary, batch_size)
    }
    for record in records:
        question = tokenizer.encode(_text(record, "question"))
        parts: list[Part] = []
        for kind, group in groupby(_answer(record), key=lambda part: next(iter(part))):
            contents = [part[kind] for part in group]
            if kind == "text":  # a line break keeps the words of neighbouring texts apart
                parts.append(("text", tokenizer.encode("\n".join(contents))))
            elif missing := [key for key in contents if key not in codes_of]:
                raise UsageError(f"{record.where}: {pictures} has no image {missing[0]!r}")
            else:
                parts += [("image", codes_of[key]) for key in contents]
        yield question_answer_document(vocabulary, question, parts)


def _with_codes(
    records: Iterable[Record],
    image_tokenizer: ImageTokenizer,
    vocabulary: JointVocabulary,
    batch_size: int,
) -> Iterator[tuple[Record, NDArray[np.int64]]]:
    """Each record with its picture's codes [tokens_per_image], on the image tokenizer's device."""
    if image_tokenizer.num_codes != vocabulary.image.size:
        raise UsageError(
            f"the image tokenizer has {image_tokenizer.num_codes} codes, the vocabulary "
            f"{vocabulary.image.size}: make the vocabulary with --num_image_codes "
            f"{image_tokenizer.num_codes}"
        )
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    device = next(image_tokenizer.parameters()).device
    for batch in _batches(records, batch_size):
        pixels = torch.stack(
            [record_pixels(record, image_tokenizer.image_size) for record in batch]
        )
        codes = image_tokenizer.encode(pixels.to(device)).cpu().numpy()
        yield from zip(batch, codes, strict=True)


def record_pixels(record: Record, size: int) -> torch.Tensor:
    """Pixels float32 [3, size, size] in [-1, 1] of the picture of a .tar's record.

    Raises:
        UsageError: it has none, or none that can be read.
    """
    data = next((record.fields[e] for e in IMAGE_EXTENSIONS if e in record.fields), None)
    if data is None:
        raise UsageError(f"{record.where} has no picture ({', '.join(IMAGE_EXTENSIONS)})")
    try:
        return pixels_from_image(Image.open(io.BytesIO(data)), size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{record.where}: the picture cannot be read ({error})") from error


def _caption(record: Record) -> str:
    if "txt" not in record.fields:
        raise UsageError(f"{record.where} has no caption (.txt)")
    try:
        caption = record.fields["txt"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{record.where}: the caption is not utf-8 ({error})") from error
    return _checked(caption, f"{record.where}: the caption")


def _text(record: Record, name: str) -> str:
    return _checked(record.fields.get(name), f"{record.where}: {name!r}")


def _answer(record: Record) -> list[dict[str, str]]:
    """The parts of an answer, {"text": ...} or {"image": ...} each, texts right-stripped."""
    answer = record.fields.get("answer")
    if not isinstance(answer, list) or not answer:
        raise UsageError(f"{record.where}: 'answer' is missing, empty or not a list")
    where = f"{record.where}: a part of 'answer'"
    parts = []
    for part in answer:
        if not isinstance(part, dict) or set(part) not in ({"text"}, {"image"}):
            raise UsageError(f'{where} is neither {{"text": ...}} nor {{"image": ...}}')
        parts.append({kind: _checked(value, where) for kind, value in part.items()})
    return parts


def _checked(value: Any, where: str) -> str:
    """`value` without trailing white space, if it is a text that utf-8 can write."""
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where} is missing, empty or not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} has a lone surrogate ({error})") from error
    return value.rstrip()


def _key_and_extension(member: tarfile.TarInfo) -> tuple[str, str]:
    path = PurePosixPath(member.name)
    name, _, extension = path.name.partition(".")
    return str(path.with_name(name)), extension.lower()


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
