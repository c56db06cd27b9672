"""Questions with illustrated answers, conversations and how-to articles become documents."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.held_out import piece_hash, pieces
from megatron_jam.data.prepare.job import Job, sift
from megatron_jam.data.prepare.pictures import Picture, decode_picture, read_codes
from megatron_jam.data.prepare.readers import read_records
from megatron_jam.data.prepare.records import (
    BadRecord,
    Chunk,
    Origin,
    Record,
    Rejected,
    fields_of,
    origin_of,
)
from megatron_jam.data.prepare.store import PictureStore
from megatron_jam.data.prepare.turns import RawPart, Selection, raw_turns
from megatron_jam.data.prepare.writing import Document, Prepared, sort_out
from megatron_jam.tokenizers.document import conversation_document


class Conversation(NamedTuple):
    """A record as a worker reads it."""

    origin: Origin
    turns: list[list[tuple[Literal["text", "image"], Any]]]
    """Questions and answers in turn: ("text", ids) and ("image", Picture) parts of each."""


@dataclass(frozen=True, kw_only=True)
class InterleavedJob(Job):
    """A document of each record.

    A record is {"question": text, "answer": [{"text": text}, {"image": name}, {"codes": codes}]};
    {"conversations": [question, answer, ...]}, texts or such lists, as LIMA has it; or an article
    {"title": text, "text1": text, "image1": name or codes, "text2": ..., "category", "rating"}.
    """

    kind = "interleaved"

    pictures: PictureStore = field(default_factory=lambda: PictureStore([]))
    """Those that records name."""

    selection: Selection = field(default_factory=Selection)
    chosen: frozenset[str] | None = None
    """The articles that :func:`choose_articles` chose; None if all are taken."""

    def settings(self) -> dict[str, Any]:
        """What the documents depend on."""
        return {"selection": dict(vars(self.selection)), **super().settings()}

    def read(self, chunk: Chunk) -> tuple[list[Conversation], list[Rejected]]:
        """Texts as ids, pictures as levels, and what is left out."""
        return sift(chunk, self._conversation)

    def _conversation(self, record: Record) -> Conversation:
        record = record._replace(fields=fields_of(record))
        is_article = "title" in record.fields
        if is_article and self.chosen is not None and record.where not in self.chosen:
            raise BadRecord(record.where, "the article was not chosen", False)
        turns = self._tokenized(record)
        length = self._length(turns)
        if self.selection.context_length and length > self.selection.context_length:
            reason = f"{length} tokens, more than context_length {self.selection.context_length}"
            raise BadRecord(record.where, reason, False)
        filled = [[(kind, self._content(record, kind, c)) for kind, c in turn] for turn in turns]
        return Conversation(
            origin_of(record),
            [[("text" if k == "text" else "image", c) for k, c in turn] for turn in filled],
        )

    def _tokenized(self, record: Record) -> list[list[RawPart]]:
        """The turns with neighbouring texts joined, as ids; pictures as they stand."""
        turns = []
        for turn in raw_turns(record, self.selection):
            parts: list[RawPart] = []
            for is_text, group in groupby(turn, key=lambda part: part[0] == "text"):
                if is_text:  # a line break keeps the words of neighbouring texts apart
                    text = "\n".join(text for _, text in group)
                    parts.append(("text", self.text_ids(text, record.where)))
                else:
                    parts += group
            turns.append(parts)
        return turns

    def _length(self, turns: list[list[RawPart]]) -> int:
        """Tokens of the document."""
        blank = [0] * (self.images.num_codes if self.images else 1)
        laid_out = [[("text", c) if k == "text" else ("image", blank) for k, c in t] for t in turns]
        return len(conversation_document(self.vocabulary, laid_out))

    def length(self, record: Record) -> int:
        """Tokens of the document of `record`, without looking at its pictures."""
        return self._length(self._tokenized(record._replace(fields=fields_of(record))))

    def _content(self, record: Record, kind: str, content: Any) -> Any:
        if kind == "text":
            return content
        if self.images is None:
            raise BadRecord(record.where, "it has pictures: name an image tokenizer")
        if kind == "codes":
            codes = read_codes(content, record.where)
            self.images.check(codes, record.where)
            return codes
        if self.images.image_size is None:
            raise BadRecord(record.where, "it has a picture where codes are needed")
        data = self.pictures.read(content, record)
        return decode_picture(data, record, self.images.image_size)

    def finish(self, read: tuple[list[Conversation], list[Rejected]]) -> Prepared:
        """The documents."""
        conversations, rejected = read
        pictures: list[Picture] = [
            content
            for each in conversations
            for turn in each.turns
            for kind, content in turn
            if kind == "image"
        ]
        codes = iter(self.images.encode(pictures) if self.images else ())
        documents = []
        for origin, turns in conversations:
            filled = [[(k, next(codes) if k == "image" else c) for k, c in turn] for turn in turns]
            tokens = conversation_document(self.vocabulary, filled)
            hashes = [piece_hash(each) for each in pieces(self.vocabulary, tokens, self.kind)]
            documents.append(Document(tokens, origin, hashes))
        return sort_out(documents, rejected, self.held_out, self.dtype)


def choose_articles(job: InterleavedJob, files: Sequence[Path]) -> InterleavedJob:
    """`job` with the articles in `files` that its selection takes, balanced over categories.

    Categories take turns, each giving its articles in an order drawn from (seed, title), until
    enough are chosen; articles that would be left out for other reasons are passed over.

    Raises:
        UsageError: there are fewer.
    """
    wanted = job.selection.num_articles
    if wanted is None:
        return job
    by_category: dict[str, list[tuple[str, str]]] = {}
    for path in files:
        for record in read_records(path):
            if "title" in record.fields and _would_do(job, record):
                key = f"{job.selection.seed} {record.fields['title']}"
                draw = hashlib.blake2b(key.encode("utf-8", "replace")).hexdigest()
                category = str(record.fields.get("category", ""))
                by_category.setdefault(category, []).append((draw, record.where))
    orders = [sorted(by_category[name]) for name in sorted(by_category)]
    turns = (each for turn in zip_longest(*orders) for each in turn if each is not None)
    chosen = [where for _, (_, where) in zip(range(wanted), turns, strict=False)]
    if len(chosen) < wanted:
        raise UsageError(f"num_articles is {wanted}, but only {len(chosen)} articles can be taken")
    return replace(job, chosen=frozenset(chosen))


def _would_do(job: InterleavedJob, record: Record) -> bool:
    try:
        length = job.length(record)
    except BadRecord:
        return False
    return job.selection.context_length is None or length <= job.selection.context_length
