"""Captions with pictures become documents, retrieved pairs in front."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.held_out import TRAINING, piece_hash
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
from megatron_jam.tokenizers.document import caption_image_document

CAPTION_FIELDS = ("txt", "caption", "text")
"""Of which a record has one."""

_RETRIEVED_FIELDS = ("retrieved", "retrieved_docs_from_img", "retrieved_docs_from_txt")


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How many of a record's retrieved pairs are laid out in front of it."""

    most: int = 0
    """K: most pairs in front."""

    number: Literal["fixed", "drawn"] = "fixed"
    """fixed: K, or all if the record has fewer. drawn: any number from 0 to that, all alike."""

    epochs: int = 1
    """Documents made of each record, each with a draw of its own."""

    seed: int = 0
    """Of the draws, which depend on it, the epoch and the record alone."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if self.most < 0 or self.epochs < 1 or self.seed < 0:
            raise UsageError(
                f"retrieval: most {self.most} and seed {self.seed} must be at least 0, epochs "
                f"{self.epochs} at least 1"
            )

    def draw(self, candidates: Sequence[Any], *, epoch: int, record: int) -> list[Any]:
        """What stands in front of a record, of which `record` is the hash, in an epoch."""
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch, record)))
        order = np.argsort(bits.random_raw(len(candidates)), kind="stable")
        number = min(self.most, len(candidates))
        if self.number == "drawn":
            number = int(bits.random_raw() % (number + 1))
        return [candidates[i] for i in order[:number]]


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
    """A caption-image document of each record, or one for each epoch."""

    kind = "pairs"

    images: ImageEncoding
    retrieval: Retrieval = field(default_factory=Retrieval)

    def settings(self) -> dict[str, Any]:
        """What the documents depend on."""
        retrieval = dict(vars(self.retrieval)) if self.retrieval.most else {}
        return {"retrieval": retrieval, **super().settings()}

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
        found = record.fields.get(name) if self.retrieval.most else None
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
            documents += self._documents(record.origin, own, retrieved)
        return sort_out(documents, rejected, self.held_out, self.dtype)

    def _documents(self, origin: Origin, own: Pair, retrieved: list[Pair]) -> list[Document]:
        piece = self._hash(own)
        unlike = {self._hash(pair): pair for pair in retrieved}
        candidates = [
            (pair, found)
            for found, pair in unlike.items()
            if found != piece and self.held_out.may_train(found)
        ]
        # Held out, a record is measured by once.
        is_training = self.held_out.slice_of(piece) == TRAINING
        documents = []
        for epoch in range(self.retrieval.epochs if is_training else 1):
            front = self.retrieval.draw(candidates, epoch=epoch, record=piece)
            tokens = caption_image_document(self.vocabulary, *own, [pair for pair, _ in front])
            documents.append(Document(tokens, origin, [*(h for _, h in front), piece]))
        return documents

    def _hash(self, pair: Pair) -> int:
        document = caption_image_document(self.vocabulary, *pair)
        return piece_hash(document[1:-1])
