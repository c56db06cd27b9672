"""Named slices that are kept out of the training set, by hashes of what documents hold.

A document is one or more pieces: a caption with its picture, and each retrieved one; a text; a
conversation. A piece's hash is a function of its ids alone, so equal pieces fall into one slice
wherever they stand, and any two sets can be compared later.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import IndexedSet, Kind, open_set
from megatron_jam.tokenizers.vocabulary import JointVocabulary

Tokens = NDArray[np.integer]
Hashes = NDArray[np.uint64]

TRAINING = ""
"""Name of what is not held out."""


def pieces(vocabulary: JointVocabulary, tokens: Tokens, kind: Kind) -> list[Tokens]:
    """The pieces of a document, joint ids each; its own comes last."""
    inner = tokens[int(tokens[0] == vocabulary.eos) : len(tokens) - 1]
    if kind != "pairs":
        return [inner]
    # T [B] M [B] T [B] M: every second break parts two pairs.
    parted = np.split(inner, np.flatnonzero(inner == vocabulary.break_)[1::2])
    return [parted[0], *(each[1:] for each in parted[1:])]


def piece_hash(piece: Tokens) -> int:
    """Hash of a piece's ids, 0 .. 2^64 - 1."""
    data = np.ascontiguousarray(piece, dtype="<u4")
    return int.from_bytes(hashlib.blake2b(data.data, digest_size=8).digest(), "little")


def set_hashes(opened: IndexedSet, vocabulary: JointVocabulary) -> Iterator[list[int]]:
    """The hashes of each document's pieces, document after document."""
    for number in range(opened.num_documents):
        found = pieces(vocabulary, opened.document(number), opened.info.kind)
        yield [piece_hash(each) for each in found]


def own_hashes(opened: Sequence[IndexedSet], vocabulary: JointVocabulary) -> Hashes:
    """The documents' own pieces of some sets, sorted."""
    # As numbers of Python's own they would take four times the memory.
    found = [
        np.fromiter((hashes[-1] for hashes in set_hashes(each, vocabulary)), np.uint64)
        for each in opened
    ]
    return np.unique(np.concatenate([*found, np.zeros(0, dtype=np.uint64)]))


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """What a tool keeps out of the training set. Equal documents, here and in other sets, fall
    into one slice; retrieved pairs that are held out are laid out in no training document."""

    shares: dict[str, float] = field(default_factory=dict)
    """Slices that go to PREFIX_NAME in place of PREFIX, with their shares: {valid: 0.001}."""

    exclude: list[str] = field(default_factory=list)
    """PREFIXes of sets none of whose documents may be in this one."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for shares or names that cannot be."""
        for name, share in self.shares.items():
            if not 0 < share < 1 or not name.isidentifier():
                raise UsageError(
                    f"held_out.shares: {name!r}: {share} is no name with a share between 0 and 1"
                )
        if sum(self.shares.values()) >= 1:
            raise UsageError("held_out.shares leave nothing for training")


@dataclass(frozen=True)
class HeldOut:
    """Which pieces no training set may contain."""

    shares: dict[str, float] = field(default_factory=dict)
    """Share of the documents in each named slice."""

    excluded: Hashes = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Pieces of sets that were held out before, sorted."""

    @classmethod
    def of(cls, config: HeldOutConfig, vocabulary: JointVocabulary) -> Self:
        """As `config` says.

        Raises:
            UsageError: a set is missing, or of another vocabulary.
        """
        opened = [open_set(prefix, vocabulary) for prefix in config.exclude]
        return cls(shares=config.shares, excluded=own_hashes(opened, vocabulary))

    def settings(self) -> dict[str, Any]:
        """As a set's settings have it."""
        excluded = np.ascontiguousarray(self.excluded, dtype="<u8")
        return {
            "held_out": self.shares,
            "excluded": hashlib.sha256(excluded.data).hexdigest() if len(excluded) else "",
        }

    def slice_of(self, piece: int) -> str:
        """The slice to which a piece of this hash belongs, or :data:`TRAINING`."""
        reach = 0.0
        for name, share in self.shares.items():
            reach += share
            if piece < reach * 2.0**64:
                return name
        return TRAINING

    def is_excluded(self, piece: int) -> bool:
        """Whether a piece of this hash stands in an excluded set."""
        if not len(self.excluded):
            return False
        place = int(np.searchsorted(self.excluded, np.uint64(piece)))
        return place < len(self.excluded) and int(self.excluded[place]) == piece

    def may_train(self, piece: int) -> bool:
        """Whether a training document may contain a piece of this hash."""
        return self.slice_of(piece) == TRAINING and not self.is_excluded(piece)
