"""Questions and answers in records of several forms, cut to what is wanted."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.records import BadRecord, Record, checked_text, text_of

RawPart = tuple[Literal["text", "image", "codes"], Any]

_NUMBERED = re.compile(r"(text|image)(\d+)")
_CODES = re.compile(r"\s*(I\d+\s*)+")
_SELF_REFERENCE = re.compile(r"\b(T|t)his article\b")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which conversations and articles are taken, and how much of each."""

    max_pictures: int | None = 3
    """Most pictures of a document; those after them are left out, their texts kept. None: all.
    (The paper has 3, its authors' code 4.)"""

    max_turns: int | None = None
    """Most questions of a conversation; what follows is left out. None: all."""

    context_length: int | None = None
    """Longer documents are left out; None: none are."""

    min_rating: float | None = None
    """Articles with no higher rating are left out (the paper: 90 of 100); None: none are."""

    num_articles: int | None = None
    """Articles that are taken, as many of each category as can be; None: all."""

    seed: int = 0
    """Of the choice of articles, which depends on it and on their titles alone."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        for name in ("max_turns", "context_length", "num_articles"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if self.max_pictures is not None and self.max_pictures < 0:
            raise UsageError(f"max_pictures must be at least 0, not {self.max_pictures}")


def raw_turns(record: Record, selection: Selection) -> list[list[RawPart]]:
    """Questions and answers in turn, as the record has them, cut to what is allowed.

    Raises:
        BadRecord: it is none of the known forms, a part is wrong, or its rating is too low.
    """
    fields = record.fields
    if "conversations" in fields:
        turns = _conversation_turns(record)
    elif "title" in fields:
        turns = [[("text", text_of(record, "title"))], _article_parts(record, selection)]
    else:
        turns = [
            [("text", text_of(record, "question"))],
            _parts(record, fields.get("answer"), "'answer'"),
        ]
    most = selection.max_turns
    turns = turns[: 2 * most if most else None]
    left = selection.max_pictures
    kept = []
    for turn in turns:
        parts = []
        for part in turn:
            if part[0] != "text" and left is not None:
                left -= 1
            if part[0] == "text" or left is None or left >= 0:
                parts.append(part)
        if not parts:
            raise BadRecord(record.where, "of a turn without text all pictures are past the most")
        kept.append(parts)
    return kept


def _conversation_turns(record: Record) -> list[list[RawPart]]:
    given = record.fields["conversations"]
    if not isinstance(given, list | tuple) or len(given) < 2:
        raise BadRecord(record.where, "'conversations' has no question with an answer")
    given = given[: len(given) // 2 * 2]  # a last question without an answer teaches nothing
    return [_parts(record, each, "a turn of 'conversations'") for each in given]


def _parts(record: Record, value: Any, what: str) -> list[RawPart]:
    """The parts of a turn: a text, or {"text": ...}, {"image": ...}, {"codes": ...} each."""
    if isinstance(value, str) and what != "'answer'":
        return [("text", checked_text(value, record.where, what))]
    if not isinstance(value, list | tuple) or not value:
        raise BadRecord(record.where, f"{what} is missing, empty or not a list")
    parts: list[RawPart] = []
    for part in value:
        kind = next(iter(part)) if isinstance(part, dict) and len(part) == 1 else None
        if kind not in ("text", "image", "codes"):
            raise BadRecord(
                record.where,
                f'a part of {what} is neither {{"text": ...}} nor {{"image": ...}} nor '
                '{"codes": ...}',
            )
        content = part[kind]
        if kind != "codes":
            content = checked_text(content, record.where, f"a part of {what}")
        parts.append((kind, content))
    return parts


def _article_parts(record: Record, selection: Selection) -> list[RawPart]:
    fields = record.fields
    if selection.min_rating is not None:
        rating = fields.get("rating")
        if not isinstance(rating, int | float):
            raise BadRecord(record.where, "the article has no rating that is a number")
        if not rating > selection.min_rating:
            raise BadRecord(record.where, f"its rating is {rating}", False)
    if "answer" in fields:
        parts = _parts(record, fields["answer"], "'answer'")
    else:
        parts = list(_numbered_parts(record))
    if not parts:
        raise BadRecord(record.where, "the article has neither 'text1' nor 'answer'")
    return [
        (kind, _SELF_REFERENCE.sub(_answer_itself, content) if kind == "text" else content)
        for kind, content in parts
    ]


def _answer_itself(found: re.Match[str]) -> str:
    return f"{found[1]}he following answer"


def _numbered_parts(record: Record) -> Iterator[RawPart]:
    """text1, image1, text2, image2, ...; numbers may be missing."""
    numbered = [
        (int(m[2]), m[1] == "image", n) for n in record.fields if (m := _NUMBERED.fullmatch(n))
    ]
    for _, is_image, name in sorted(numbered):
        value = record.fields[name]
        if value is None or value == "":
            continue
        if not is_image:
            yield "text", checked_text(value, record.where, repr(name))
        elif not isinstance(value, str) or _CODES.fullmatch(value):
            yield "codes", value
        else:
            yield "image", value
