"""Parts of input files as bytes, and records as chunks: what all readers share."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow

from megatron_jam.data.prepare.records import BadRecord, Chunk, Position, Record, Records

CHUNK_BYTES = 1 << 20
"""Of lines that are read, and sent to a worker, at once."""

CHUNK_ROWS = 256
"""The same for tables and archives."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


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
    """The bytes of a file, decompressed if its name ends so; they can be sought forward.

    Raises:
        BadRecord: a compressed file is damaged or was cut off.
    """
    if path.suffix not in COMPRESSIONS:
        with path.open("rb") as stream:
            yield stream
        return
    # pyarrow's, as zstandard's own reader takes a file that was cut off for a whole one.
    with pyarrow.CompressedInputStream(str(path), COMPRESSIONS[path.suffix]) as decompressed:
        yield io.BufferedReader(_Forward(decompressed, path), CHUNK_BYTES)


class _Forward(io.RawIOBase):
    """A stream as a raw file that can be sought forward."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._offset:
            raise io.UnsupportedOperation("a compressed file is read forward")
        while self._offset < offset and self._read(min(CHUNK_BYTES, offset - self._offset)):
            pass
        return self._offset

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except (OSError, pyarrow.ArrowException) as error:
            kind = self._path.suffix
            raise BadRecord(str(self._path), f"it is not a whole {kind} file ({error})") from error
        self._offset += len(data)
        return data
