"""The one id space of text, picture codes and special tokens: which id is what stands here only."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import write_text_atomically

TEXT = 0
"""Modality of the text BPE's ids."""
IMAGE = 1
"""Modality of the picture codes."""
SPECIAL = 2
"""Modality of every other id."""

VOCABULARY_FILE = "vocabulary.json"
TEXT_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first ids of the text tokenizer, in order."""

_RANGES = ("text", "image", "sentinels")
_SINGLES = {"bos", "pad", "eos", "unk", "break_", "eoss"}
NO_ID = -1
"""`<break>` and `<eoss>` of a vocabulary without picture codes."""


class IdRange(NamedTuple):
    """The ids start .. start + size - 1."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + self.size


@dataclass(frozen=True, kw_only=True)
class JointVocabulary:
    """The ids of one model. Ids may exist that are in no range and have no name: they are SPECIAL.

    An LLM's own vocabulary has neither picture codes nor sentinels (ranges of size 0); NO_ID is its
    `<break>` and its `<eoss>`.

    `bos`, `pad`, `eos` and `unk` usually lie inside `text`, yet are SPECIAL. Rows that a model adds
    to pad its embedding are not counted here.
    """

    size: int
    """Number of ids."""

    text: IdRange
    """Ids of the text tokenizer, specials included: text id i is joint id text.start + i."""

    image: IdRange
    """Ids of the picture codes."""

    sentinels: IdRange
    """Ids of `<sentinel:0>`, `<sentinel:1>`, ..."""

    bos: int
    """`<s>`."""

    pad: int
    """`<pad>`: never a target of the loss."""

    eos: int
    """`</s>`, at the start and the end of documents."""

    unk: int
    """`<unk>`: never made by a byte-level tokenizer."""

    break_: int
    """`<break>`, between text and pictures."""

    eoss: int
    """`<eoss>`, at the end of a span that the CM3 objective moved."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for ids outside the vocabulary or used twice."""
        ranges = {name: getattr(self, name) for name in _RANGES}
        least = {"text": 1, "image": int(self.has_pictures), "sentinels": int(self.has_pictures)}
        for name, ids in ranges.items():
            if ids.start < 0 or ids.size < least[name] or ids.stop > self.size:
                raise UsageError(f"vocabulary: {name} {tuple(ids)} is not within 0..{self.size}")
        if self.image.size and not self.has_pictures:
            raise UsageError("vocabulary: image needs ids break_ and eoss")
        ordered = sorted(ranges.values())
        if any(a.stop > b.start for a, b in pairwise(ordered)):
            raise UsageError("vocabulary: the ranges text, image and sentinels overlap")
        singles = list(self.singles.values())
        if len(set(singles)) < len(singles) or not all(0 <= i < self.size for i in singles):
            raise UsageError(f"vocabulary: special ids {singles} repeat or leave 0..{self.size}")
        if any(ids.start <= i < ids.stop for ids in (self.image, self.sentinels) for i in singles):
            raise UsageError(f"vocabulary: special ids {singles} lie in image or sentinels")

    @classmethod
    def build(cls, *, text_size: int, num_image_codes: int, num_sentinels: int) -> Self:
        """Lay out text ids (specials first), picture codes, `<break>`, `<eoss>`, sentinels; text
        ids alone if there are 0 codes."""
        image = IdRange(text_size, num_image_codes)
        if not num_image_codes:
            num_sentinels = 0
        sentinels = IdRange(image.stop + 2 * bool(num_image_codes), num_sentinels)
        bos, pad, eos, unk = range(len(TEXT_SPECIALS))
        return cls(
            size=sentinels.stop,
            text=IdRange(0, text_size),
            image=image,
            sentinels=sentinels,
            bos=bos,
            pad=pad,
            eos=eos,
            unk=unk,
            break_=image.stop if num_image_codes else NO_ID,
            eoss=image.stop + 1 if num_image_codes else NO_ID,
        )

    @property
    def has_pictures(self) -> bool:
        """Whether documents with pictures can be written in these ids."""
        return (self.break_, self.eoss) != (NO_ID, NO_ID)

    @property
    def singles(self) -> dict[str, int]:
        """The special ids that there are, by name."""
        ids = {name: getattr(self, name) for name in sorted(_SINGLES)}
        return {n: i for n, i in ids.items() if self.has_pictures or n not in ("break_", "eoss")}

    def require_pictures(self) -> None:
        """Raise :class:`UsageError` if there are no picture codes."""
        if not self.has_pictures:
            raise UsageError(
                "the vocabulary has no picture codes: take one of a model that knows pictures"
            )

    @cached_property
    def modality(self) -> NDArray[np.int8]:
        """TEXT, IMAGE or SPECIAL of each id, int8 [size], read-only."""
        table = np.full(self.size, SPECIAL, dtype=np.int8)
        table[self.text.start : self.text.stop] = TEXT
        table[self.image.start : self.image.stop] = IMAGE
        table[list(self.singles.values())] = SPECIAL
        table.flags.writeable = False
        return table

    def image_id(self, codes: ArrayLike) -> NDArray[np.int64]:
        """Joint ids, int64 of the same shape, of picture `codes`; ValueError beyond the range."""
        self.require_pictures()
        codes = np.asarray(codes, dtype=np.int64)
        _check_within(codes, self.image.size, "picture codes")
        return codes + self.image.start

    def image_code(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Picture codes, int64 of the same shape, of joint `ids`; ValueError for other ids."""
        codes = np.asarray(ids, dtype=np.int64) - self.image.start
        _check_within(codes, self.image.size, "picture codes")
        return codes

    def text_id(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """Joint ids, int64 of the same shape, of the text tokenizer's ids; ValueError for others,
        special ids among them: no text may hold one."""
        tokens = np.asarray(tokens, dtype=np.int64)
        _check_within(tokens, self.text.size, "text ids")
        ids = tokens + self.text.start
        if np.any(self.modality[ids] != TEXT):
            raise ValueError("a special id stands in a text")
        return ids

    def sentinel(self, index: int) -> int:
        """The id of `<sentinel:index>`; ValueError beyond the range."""
        if not 0 <= index < self.sentinels.size:
            raise ValueError(f"sentinel {index} is not one of {self.sentinels.size}")
        return self.sentinels.start + index

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the layout: equal exactly when two vocabularies are equal."""
        return hashlib.sha256(json.dumps(self._as_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        write_text_atomically(path, self.as_json())

    def as_json(self) -> str:
        """The text of its vocabulary.json."""
        return json.dumps(self._as_dict(), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: the file is missing or holds no vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(
                f"no vocabulary at {path}: make one with tools/train_text_tokenizer.py"
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            for name, value in fields.items():
                fields[name] = IdRange(*map(int, value)) if name in _RANGES else int(value)
            return cls(**fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a vocabulary: {error}") from error

    def _as_dict(self) -> dict[str, Any]:
        # Plain integers: numpy's would not go into JSON.
        ranges = {name: [int(i) for i in getattr(self, name)] for name in _RANGES}
        singles = {name: int(getattr(self, name)) for name in sorted(_SINGLES)}
        return {"size": int(self.size), **ranges, **singles}


def _check_within(values: NDArray[np.int64], size: int, what: str) -> None:
    if values.size and not 0 <= values.min() <= values.max() < size:
        raise ValueError(f"{what} {values.min()}..{values.max()} are not within 0..{size - 1}")
