"""Parts of input files as bytes, and records as chunks: what all readers share."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from megatron_jam.data.prepare.records import BadRecord, Chunk, Position, Record, Records

CHUNK_BYTES = 1 << 20
"""Of lines that are read, and sent to a worker, at once."""

CHUNK_ROWS = 256
"""The same for tables and archives."""

COMPRESSIONS = (".gz", ".zst")


class Step(NamedTuple):
    """A chunk, and the place behind it."""

    chunk: Chunk
    position: Position


class Part(NamedTuple):
    """Which records of a file are read: those that begin in bytes (tables: rows) [start, stop)."""

    path: Path
    start: int
    stop: int | None
    """None: to the end."""


def plain_suffix(path: Path) -> str:
    """The ending of a file's name, without that of a compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def grouped(
    records: Iterator[tuple[Record | BadRecord, Position]], num_records: int
) -> Iterator[Step]:
    """Chunks of `num_records` records, each of which comes with the place behind it; the last
    chunk, or the one that an error ends, may have fewer."""
    items: list[Record | BadRecord] = []
    position = Position(0, 0)
    try:
        for item, position in records:
            items.append(item)
            if len(items) == num_records:
                yield Step(Records(items), position)
                items = []
    except BadRecord:
        if items:
            yield Step(Records(items), position)
        raise
    if items:
        yield Step(Records(items), position)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed if its name ends so; what is damaged is a BadRecord."""
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                yield gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
            elif path.suffix == ".zst":
                window = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                stream = window.stream_reader(raw, read_across_frames=True)
                yield io.BufferedReader(_Forward(stream), CHUNK_BYTES)
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise BadRecord(str(path), f"it is not a whole {path.suffix} file ({error})") from error


class _Forward(io.RawIOBase):
    """A zstandard stream as a raw one that can be sought forward."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._ended = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        return self._stream.readinto(buffer)
