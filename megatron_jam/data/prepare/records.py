"""Records of input files, and what is wrong with them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from megatron_jam.config.errors import UsageError

MAX_LINE_BYTES = 1 << 26
"""A longer line is bad: it would not be a text but a file without line breaks."""


class Record(NamedTuple):
    """One record of an input file."""

    where: str
    """File and line, file and row, or file and key: what an error message starts with."""

    key: str
    """Name of a .tar's record; number of the line or row in other files."""

    fields: dict[str, Any]
    """A line's JSON object, a table's row; of a .tar's record bytes by extension, and what its
    .json file holds."""

    place: str
    """The input file, to whose folder names of picture files are relative."""


class Origin(NamedTuple):
    """Whence a document comes, so that it can be found and withdrawn."""

    where: str
    """File, and line, row or key."""

    source: str | None
    """What the record says of its source."""

    licence: str | None
    """What it says of its licence."""


class Rejected(NamedTuple):
    """A record that is left out."""

    where: str
    """As in :class:`Record`."""

    reason: str
    """What is wrong with it, or why it is not wanted."""

    is_bad: bool = True
    """Whether something is wrong with it."""


class BadRecord(UsageError):
    """A record that becomes no document: a line of an error message, or of a list."""

    def __init__(self, where: str, reason: str, is_bad: bool = True) -> None:
        """Say `where`, and for what `reason`, which is cut to one line of some length."""
        self.rejected = Rejected(where, " ".join(reason.split())[:500], is_bad)
        super().__init__(f"{where}: {self.rejected.reason}")


class Chunk(Protocol):
    """Neighbouring records of one file, on their way to a worker."""

    def records(self) -> Iterator[Record | BadRecord]:
        """The records in order, and what stands in place of one."""
        ...


class Position(NamedTuple):
    """A place between two records of a file."""

    offset: int
    """Bytes before it, of the decompressed file; of tables, rows."""

    number: int
    """Lines, rows or records before it."""


START = Position(0, 0)


@dataclass(frozen=True)
class Records:
    """Records that were read."""

    items: list[Record | BadRecord]

    def records(self) -> Iterator[Record | BadRecord]:
        """The records."""
        return iter(self.items)

    def __reduce__(self) -> tuple[Any, ...]:
        """How it travels to a worker: an exception by what it was made from."""
        bad = {i: e.rejected for i, e in enumerate(self.items) if isinstance(e, BadRecord)}
        return _records, ([None if i in bad else e for i, e in enumerate(self.items)], bad)


def _records(items: list[Any], bad: dict[int, Rejected]) -> Records:
    return Records([BadRecord(*bad[i]) if i in bad else each for i, each in enumerate(items)])


@dataclass(frozen=True)
class Lines:
    """Whole lines of a .jsonl, one JSON object each, not parsed yet; blank lines are skipped."""

    path: str
    data: bytes
    first: int
    """Number of the first line, from 1."""

    is_cut: bool = False
    """Whether the last line is longer than is read."""

    def records(self) -> Iterator[Record | BadRecord]:
        """The lines' objects."""
        lines = self.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, start=self.first):
            where = f"{self.path}:{number}"
            if self.is_cut and number == self.first + len(lines) - 1:
                yield BadRecord(where, f"the line is longer than {MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield self._parsed(where, number, line)

    def _parsed(self, where: str, number: int, line: bytes) -> Record | BadRecord:
        try:
            fields = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return BadRecord(where, f"not valid JSON ({error})")
        if not isinstance(fields, dict):
            return BadRecord(where, f"not a JSON object but {type(fields).__name__}")
        return Record(where, str(number), fields, self.path)


def given(chunk: Chunk) -> Iterator[Record]:
    """The records of `chunk`; a bad one is raised."""
    for each in chunk.records():
        if isinstance(each, BadRecord):
            raise each
        yield each


def text_of(record: Record, *names: str) -> str:
    """The text in the first of the fields `names` that the record has, right-stripped.

    Raises:
        BadRecord: it has none, or an empty one, or it is no text that utf-8 can write.
    """
    name = next((each for each in names if each in record.fields), names[0])
    value = record.fields.get(name)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecord(record.where, f"{name!r} is not utf-8 ({error})") from error
    return checked_text(value, record.where, repr(name))


def checked_text(value: Any, where: str, what: str) -> str:
    """`value` without trailing white space, if it is a text that utf-8 can write."""
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(where, f"{what} is missing, empty or not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(where, f"{what} has a lone surrogate ({error})") from error
    return value.rstrip()


def fields_of(record: Record) -> dict[str, Any]:
    """The record's fields; of a .tar's record also those in its .json file.

    Raises:
        BadRecord: that file is no JSON object.
    """
    data = record.fields.get("json")
    if not isinstance(data, bytes) or not data.strip():
        return record.fields
    try:
        described = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(record.where, f"its .json is not valid JSON ({error})") from error
    if not isinstance(described, dict):
        raise BadRecord(record.where, "its .json is no JSON object")
    return described | record.fields


def origin_of(record: Record) -> Origin:
    """Source and licence as the record's fields name them."""
    return Origin(
        record.where,
        _named(record, "source", "url"),
        _named(record, "licence", "license"),
    )


def _named(record: Record, *names: str) -> str | None:
    values = (record.fields.get(name) for name in names)
    value = next((each for each in values if each not in (None, "", b"")), None)
    if value is None:
        return None
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates
