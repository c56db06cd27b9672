"""Input files as chunks of records, read as a stream from any place on.

A run's files, in the order they are given, are one row of records. A shard i of n has those that
begin in the i-th nth of all files' bytes, so that the shards, one after the other, are the run.
What cannot be entered in the middle (compressed files, .csv) belongs to one shard as a whole.
"""

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.archives import read_tar
from megatron_jam.data.prepare.files import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Part,
    Step,
    opened,
    plain_suffix,
)
from megatron_jam.data.prepare.records import (
    MAX_LINE_BYTES,
    START,
    BadRecord,
    Lines,
    Position,
    Record,
    given,
)
from megatron_jam.data.prepare.tables import num_rows, read_csv, read_parquet

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files of which a folder of pictures has one: a row with the name and the caption of each."""


def expand(inputs: Sequence[str]) -> list[Path]:
    """The files of `inputs`: files, folders with a table, and patterns, whose files are sorted.

    Raises:
        UsageError: one is not there, or of no known kind.
    """
    files: list[Path] = []
    for each in inputs:
        found = sorted(glob.glob(each)) if glob.has_magic(each) else [each]
        if not found:
            raise UsageError(f"{each}: no file has such a name")
        files += map(_table_of, map(Path, found))
    if not files:
        raise UsageError("name one input or more")
    for path in files:
        _reader(path)
        path.stat()  # FileNotFoundError names it
    return files


def _table_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in TABLES if (path / name).is_file()]
    if len(found) != 1:
        raise UsageError(f"{path} is a folder: it needs one of {', '.join(TABLES)}")
    return found[0]


def shard_of(files: Sequence[Path], shard: tuple[int, int]) -> list[Part]:
    """What shard (i, n), i from 0, reads of `files`."""
    number, count = shard
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    low, high = total * number // count, total * (number + 1) // count
    parts, begin = [], 0
    for path, size in zip(files, sizes, strict=True):
        # An empty file at the very end belongs to the last shard.
        begins_here = low <= begin < high or (begin == total and number == count - 1)
        if path.suffix not in (".jsonl", ".tar", ".parquet"):
            if begins_here:
                parts.append(Part(path, 0, None))
        elif begins_here or begin < low < begin + size:
            start, stop = max(low - begin, 0), min(high - begin, size)
            if path.suffix == ".parquet":
                rows = num_rows(path)
                start, stop = (-(-rows * each // max(size, 1)) for each in (start, stop))
            whole = stop >= size and path.suffix != ".parquet"
            if whole or start < stop:
                parts.append(Part(path, start, None if whole else stop))
        begin += size
    return parts


def read_part(part: Part, position: Position | None, *, num_records: int) -> Iterator[Step]:
    """The chunks of a part of a file, from `position` on; None is its beginning.

    A chunk has `num_records` records; with 0 as many lines as :data:`CHUNK_BYTES` hold, or
    :data:`CHUNK_ROWS` records of other files.

    Raises:
        BadRecord: the file cannot be read to its end, or is empty.
    """
    is_empty = part.start == 0
    is_lines = plain_suffix(part.path) == ".jsonl"
    size = num_records if is_lines else num_records or CHUNK_ROWS
    for step in _reader(part.path)(part, position, size):
        is_empty = False
        yield step
    if is_empty and part.stop is None and position is None:
        raise BadRecord(str(part.path), "the file is empty")


def read_records(path: Path | str) -> Iterator[Record]:
    """All records of a file of any kind; a bad one is raised."""
    (path,) = expand([str(path)])
    for step in read_part(Part(path, 0, None), None, num_records=1):
        yield from given(step.chunk)


def _reader(path: Path) -> Callable[[Part, Position | None, int], Iterator[Step]]:
    kinds = {
        ".jsonl": _read_lines,
        ".tar": read_tar,
        ".parquet": read_parquet,
        ".csv": read_csv,
        ".tsv": read_csv,
    }
    kind = plain_suffix(path)
    if kind not in kinds or (kind == ".parquet" and path.suffix != kind):
        raise UsageError(
            f"{path} is of no known kind: .jsonl, .tar, .csv, .tsv (each also .gz or .zst), "
            ".parquet, or a folder with a table"
        )
    return kinds[kind]


def _read_lines(part: Part, position: Position | None, num_records: int) -> Iterator[Step]:
    with opened(part.path) as stream:
        offset, number = position or _line_start(stream, part.start)
        stream.seek(offset)
        while part.stop is None or offset < part.stop:
            left = CHUNK_BYTES if part.stop is None else min(CHUNK_BYTES, part.stop - offset)
            data = _whole_lines(stream, left, num_records)
            if not data:
                return
            num_skipped = 0
            if len(data) - data.rfind(b"\n", 0, -1) > MAX_LINE_BYTES:
                num_skipped = 0 if data.endswith(b"\n") else _skip_line(stream)
                chunk = Lines(str(part.path), data, number + 1, is_cut=True)
            else:
                chunk = Lines(str(part.path), data, number + 1)
            offset += len(data) + num_skipped
            number += data.count(b"\n") + (not data.endswith(b"\n"))
            if not data.isspace():
                yield Step(chunk, Position(offset, number))


def _whole_lines(stream: IO[bytes], size: int, num_records: int) -> bytes:
    """The lines that begin within `size` bytes, `num_records` at most; all of them if it is 0. Of
    the last one no more than is allowed of a line, and a byte."""
    if not num_records:
        data = stream.read(size)
        whole = not data or data.endswith(b"\n")
        return data if whole else data + stream.readline(MAX_LINE_BYTES + 1)
    lines: list[bytes] = []
    while size > 0 and len(lines) < num_records:
        lines.append(stream.readline(MAX_LINE_BYTES + 1))
        size -= len(lines[-1])
        if not lines[-1].endswith(b"\n"):
            break
    return b"".join(lines)


def _skip_line(stream: IO[bytes]) -> int:
    """Read on to the next line; the number of bytes."""
    num_bytes = 0
    while rest := stream.readline(CHUNK_BYTES):
        num_bytes += len(rest)
        if rest.endswith(b"\n"):
            break
    return num_bytes


def _line_start(stream: IO[bytes], start: int) -> Position:
    """The first line that begins at byte `start` or behind it."""
    if not start:
        return START
    number, left = 0, start - 1
    while left and (data := stream.read(min(CHUNK_BYTES, left))):
        number += data.count(b"\n")
        left -= len(data)
    rest = _skip_line(stream)  # of the line that begins before
    return Position(start - 1 + rest, number + 1)
