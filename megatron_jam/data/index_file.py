"""The files PREFIX.bin and PREFIX.idx of Megatron's indexed sets, written and read in pieces.

.bin: all tokens in a row. .idx, little-endian and not aligned: magic, version, dtype code, number
of sequences S, number of documents + 1; then int32 lengths [S], int64 byte offsets [S], and int64
borders of documents in sequences, from 0 on. (megatron.core.datasets.indexed_dataset, which needs
seconds to import, a Python loop over all sequences to write, and all lengths in memory.)
"""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import temporary_name

DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
"""Megatron's dtypes by their codes."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Items of an array that are in memory at once when files are written, copied or hashed.
_CHUNK = 1 << 20


class Sequences(NamedTuple):
    """Documents as rows of sequences."""

    borders: NDArray[np.int64]
    """Document i is the sequences borders[i] .. borders[i + 1] - 1, [num_documents + 1]."""

    edges: NDArray[np.int64]
    """Sequence j is the tokens edges[j] .. edges[j + 1] - 1, [num_sequences + 1]."""


class Index(NamedTuple):
    """What an .idx file says of its .bin file."""

    dtype: np.dtype
    """Of the tokens."""

    starts: NDArray[np.int64]
    """First token of each document, [num_documents]."""

    lengths: NDArray[np.integer]
    """Tokens of each document, [num_documents], int32 or int64."""

    sequences: Sequences | None = None
    """None if each document is one."""


class TokenWriter:
    """Writes a .bin file document by document, then its .idx file, in constant memory.

    Both are written under temporary names, which :meth:`finish` leaves complete; lengths and counts
    wait in files of their own.
    """

    def __init__(self, prefix: Path | str, dtype: DTypeLike) -> None:
        """Begin files for PREFIX, in an existing folder; `dtype` is one of :data:`DTYPES`."""
        self.dtype = np.dtype(dtype)
        self.paths = {name: temporary_name(Path(f"{prefix}.{name}")) for name in ("bin", "idx")}
        self.num_documents = 0
        self.num_tokens = 0
        self._num_due = 0
        self._num_sequences = 0
        self._num_sequences_due = 0
        self._bin = self.paths["bin"].open("wb")
        self._waiting = {
            name: temporary_name(Path(f"{prefix}.{name}")).open("w+b")
            for name in ("lengths", "counts")
        }
        self._hash = hashlib.sha256()

    def add(
        self,
        tokens: NDArray[np.integer],
        lengths: NDArray[np.integer] | None = None,
        counts: NDArray[np.integer] | None = None,
    ) -> None:
        """Append documents that stand in a row.

        The caller knows that the writer's dtype holds the ids. What is said of a document need not
        come in the call in which its tokens do.

        Args:
            tokens: theirs.
            lengths: tokens of each sequence; by default all are of one.
            counts: sequences of each document; by default one.
        """
        data = np.ascontiguousarray(tokens, dtype=self.dtype)
        sizes = np.array([data.size]) if lengths is None else lengths
        numbers = np.ones(len(sizes), dtype="<i4") if counts is None else counts
        self._bin.write(data.data)
        self._hash.update(data.data)
        for name, values in (("lengths", sizes), ("counts", numbers)):
            self._waiting[name].write(np.ascontiguousarray(values, dtype="<i4").data)
        self.num_documents += len(numbers)
        self.num_tokens += data.size
        self._num_due += int(sizes.sum(dtype=np.int64))
        self._num_sequences += len(sizes)
        self._num_sequences_due += int(numbers.sum(dtype=np.int64))

    def finish(self) -> dict[str, str]:
        """Complete both files; the sha256 of each, by "bin" and "idx".

        Raises:
            ValueError: lengths do not add up to the tokens, or counts to the sequences.
        """
        if self.num_tokens != self._num_due:
            raise ValueError(f"{self.num_tokens} tokens for lengths of {self._num_due} in all")
        if self._num_sequences != self._num_sequences_due:
            raise ValueError(
                f"{self._num_sequences} sequences for counts of {self._num_sequences_due} in all"
            )
        self._bin.close()
        with self.paths["idx"].open("wb") as stream:
            sizes = self._num_sequences, self.num_documents
            sha256 = _write_index(stream, *self._waiting.values(), *sizes, self.dtype)
        self._drop_waiting()
        return {"bin": self._hash.hexdigest(), "idx": sha256}

    def discard(self) -> None:
        """Remove everything that was written."""
        self._bin.close()
        self._drop_waiting()
        for path in self.paths.values():
            path.unlink(missing_ok=True)

    def _drop_waiting(self) -> None:
        for stream in self._waiting.values():
            stream.close()
            Path(stream.name).unlink(missing_ok=True)


def _write_index(
    stream: BinaryIO,
    lengths: BinaryIO,
    counts: BinaryIO,
    num_sequences: int,
    num_documents: int,
    dtype: np.dtype,
) -> str:
    """Write an .idx file; its sha256."""
    sha256 = hashlib.sha256()

    def write(data: bytes) -> None:
        stream.write(data)
        sha256.update(data)

    write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], num_sequences, num_documents + 1))
    lengths.seek(0)
    while chunk := lengths.read(4 * _CHUNK):
        write(chunk)
    begin = 0
    for ends in _running_sums(lengths):
        starts = np.concatenate([[begin], ends[:-1]]) * dtype.itemsize
        write(starts.astype("<i8").tobytes())
        begin = int(ends[-1])
    write(bytes(8))
    for ends in _running_sums(counts):
        write(ends.astype("<i8").tobytes())
    return sha256.hexdigest()


def _running_sums(stream: BinaryIO) -> Iterator[NDArray[np.int64]]:
    """The sums of all int32 of a file up to each, in chunks."""
    stream.seek(0)
    end = 0
    while chunk := stream.read(4 * _CHUNK):
        sums = end + np.cumsum(np.frombuffer(chunk, dtype="<i4"), dtype=np.int64)
        end = int(sums[-1])
        yield sums


def read_index(prefix: Path | str) -> Index:
    """The content of PREFIX.idx; lengths are memory-mapped.

    Raises:
        UsageError: PREFIX.bin or PREFIX.idx is missing, is not Megatron's, was cut short, or they
            are not of one set.
    """
    path = Path(f"{prefix}.idx")
    for name in ("bin", "idx"):
        if not Path(f"{prefix}.{name}").is_file():
            raise UsageError(f"{prefix}.{name} is missing: prepare the set again")
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UsageError(f"{path} is not a Megatron index: prepare the set again")
    _, version, code, num_sequences, num_borders = _HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise UsageError(f"{path} has an unknown version or dtype: prepare the set again")
    # Behind the borders a set may have a byte for each sequence, which says of what mode it is.
    due = _HEADER.size + num_sequences * (4 + 8) + num_borders * 8
    if path.stat().st_size not in (due, due + num_sequences):
        raise UsageError(
            f"{path} has {path.stat().st_size} bytes, not {due}: it is cut short or no index; "
            "prepare the set again"
        )
    lengths = _map(path, "<i4", num_sequences, _HEADER.size)
    offsets = _map(path, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    borders = _map(path, "<i8", num_borders, _HEADER.size + 12 * num_sequences)
    return _checked_index(prefix, DTYPES[code], lengths, offsets, borders)


def _map(path: Path, dtype: str, count: int, offset: int) -> NDArray:
    if not count:
        return np.zeros(0, dtype=dtype)
    # A plain array over the map: slices of np.memmap itself cost ten times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,), offset=offset))


def _checked_index(
    prefix: Path | str, dtype: np.dtype, lengths: NDArray, offsets: NDArray, borders: NDArray
) -> Index:
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    size, due = Path(f"{prefix}.bin").stat().st_size, int(sum(ends[-1:])) * dtype.itemsize
    if size != due:
        raise UsageError(
            f"{prefix}.bin has {size} bytes, not {due}, as {prefix}.idx says: it is cut short or of"
            " another set; prepare the set again"
        )
    if np.any(lengths < 0) or not np.array_equal(offsets, starts * dtype.itemsize):
        raise UsageError(f"{prefix}.idx is damaged: its offsets do not follow from its lengths")
    if len(borders) == len(lengths) + 1 and np.array_equal(borders, np.arange(len(borders))):
        return Index(dtype, starts, lengths)
    # Documents of several sequences.
    if (
        not len(borders)
        or borders[0]
        or borders[-1] != len(lengths)
        or np.any(np.diff(borders) < 0)
    ):
        raise UsageError(f"{prefix}.idx is damaged: its documents do not follow from its sequences")
    sequences = Sequences(np.ascontiguousarray(borders), np.concatenate([[0], ends]))
    edges = sequences.edges[sequences.borders]
    return Index(dtype, edges[:-1], np.diff(edges), sequences)


def map_tokens(prefix: Path | str, dtype: np.dtype) -> NDArray:
    """All tokens of PREFIX.bin, memory-mapped, read-only."""
    path = Path(f"{prefix}.bin")
    return _map(path, dtype.str, path.stat().st_size // dtype.itemsize, 0)


def chunks(values: NDArray) -> Iterator[NDArray]:
    """`values` in a row of views that memory holds easily."""
    for first in range(0, len(values), _CHUNK):
        yield values[first : first + _CHUNK]


def file_sha256(path: Path | str) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
