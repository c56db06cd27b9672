"""Captions with pictures become documents, retrieved pairs in front."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.held_out import piece_hash
from megatron_jam.data.prepare.job import Job, sift
from megatron_jam.data.prepare.pictures import (
    ImageEncoding,
    Picture,
    picture_of,
    read_codes,
    split_metaseq,
)
from megatron_jam.data.prepare.records import (
    BadRecord,
    Chunk,
    Origin,
    Record,
    Rejected,
    checked_text,
    fields_of,
    origin_of,
    text_of,
)
from megatron_jam.data.prepare.writing import Document, Prepared, sort_out
from megatron_jam.tokenizers.document import caption_image_document, caption_image_sequences

CAPTION_FIELDS = ("txt", "caption", "text")
"""Of which a record has one."""

_RETRIEVED_FIELDS = ("retrieved", "retrieved_docs_from_img", "retrieved_docs_from_txt")


class Pair(NamedTuple):
    """A caption and its picture."""

    caption: list[int]
    """The text tokenizer's ids."""

    picture: Picture


class PairRecord(NamedTuple):
    """A record as a worker reads it."""

    origin: Origin
    pair: Pair
    retrieved: list[Pair]


@dataclass(frozen=True, kw_only=True)
class PairJob(Job):
    """A caption-image document of each record."""

    kind = "pairs"

    images: ImageEncoding

    retrieved: int = 0
    """Most retrieved pairs that a document has in front, each a sequence of its own; the first of
    those that the record names, without itself, equal ones and what is held out. A run draws from
    them in each epoch."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if self.retrieved < 0:
            raise UsageError(f"retrieved must be at least 0, not {self.retrieved}")

    def settings(self) -> dict[str, Any]:
        """What the documents depend on."""
        return {"retrieved": self.retrieved, **super().settings()}

    def read(self, chunk: Chunk) -> tuple[list[PairRecord], list[Rejected]]:
        """Captions as ids, pictures as levels, and what is no pair."""
        return sift(chunk, self._pair_record)

    def _pair_record(self, record: Record) -> PairRecord:
        record = record._replace(fields=fields_of(record))
        retrieved = [
            self._pair(candidate)
            for name in _RETRIEVED_FIELDS
            for candidate in self._candidates(record, name)
        ]
        return PairRecord(origin_of(record), self._pair(record), retrieved)

    def _candidates(self, record: Record, name: str) -> list[Record]:
        """The retrieved records in field `name`: objects with a caption and codes or a picture,
        which is a file of the same record in a .tar; or texts as metaseq stores pairs."""
        found = record.fields.get(name) if self.retrieved else None
        if not isinstance(found, list | tuple | None):
            raise BadRecord(record.where, f"{name!r} is no list")
        candidates = []
        for number, each in enumerate(found or ()):
            fields = {"text": each} if isinstance(each, str) else each
            if not isinstance(fields, dict):
                raise BadRecord(record.where, f"{name!r} holds neither objects nor texts")
            content = record.fields.get(fields.get("image"))
            if isinstance(content, bytes):
                fields = fields | {"image": content}
            where = f"{record.where}, {name} {number + 1}"
            candidates.append(Record(where, str(number), fields, record.place))
        return candidates

    def _pair(self, record: Record) -> Pair:
        caption = text_of(record, *CAPTION_FIELDS)
        parts = split_metaseq(caption)
        if parts:
            caption = checked_text(parts[0], record.where, "the caption")
            picture: Picture = read_codes(parts[1], record.where)
        else:
            picture = picture_of(record, record.fields, self.images.image_size)
        if picture.ndim == 1:
            self.images.check(picture, record.where)
        return Pair(self.text_ids(caption, record.where), picture)

    def finish(self, read: tuple[list[PairRecord], list[Rejected]]) -> Prepared:
        """The documents."""
        records, rejected = read
        pictures = [p.picture for each in records for p in (each.pair, *each.retrieved)]
        codes = iter(self.images.encode(pictures))
        documents: list[Document] = []
        for record in records:
            own = record.pair._replace(picture=next(codes))
            retrieved = [pair._replace(picture=next(codes)) for pair in record.retrieved]
            documents.append(self._document(record.origin, own, retrieved))
        return sort_out(documents, rejected, self.held_out, self.dtype)

    def _document(self, origin: Origin, own: Pair, retrieved: list[Pair]) -> Document:
        piece = self._hash(own)
        unlike = {self._hash(pair): pair for pair in retrieved}
        front = {
            found: pair
            for found, pair in unlike.items()
            if found != piece and self.held_out.may_train(found)
        }
        kept = list(front.items())[: self.retrieved]
        sequences = caption_image_sequences(self.vocabulary, *own, [pair for _, pair in kept])
        return Document(
            np.concatenate(sequences),
            origin,
            [*(found for found, _ in kept), piece],
            [len(each) for each in sequences],
        )

    def _hash(self, pair: Pair) -> int:
        document = caption_image_document(self.vocabulary, *pair)
        return piece_hash(document[1:-1])
