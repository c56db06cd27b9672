"""What a preparing run writes, so that a killed one goes on where it was.

While it runs, the folder .NAME.writing beside PREFIX holds append-only files and state.json: how
much of each file counts, and which record comes next. A run that finds it there cuts the files to
that length and goes on. At the end the files become sets, and the folder goes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, temporary_name, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.data.indexed import SetWriter
from megatron_jam.data.prepare.held_out import HeldOut
from megatron_jam.data.prepare.records import Origin, Position, Rejected

COMMIT_SECONDS = 5.0
"""Between two states that are written: at most so much work is lost."""

BYTES_AT_ONCE = 1 << 22

ROWS_AT_ONCE = 1 << 16
"""Of the side table, in memory."""

SIDE_TABLE = pyarrow.schema(
    [
        ("where", pyarrow.string()),
        ("source", pyarrow.string()),
        ("licence", pyarrow.string()),
        ("pieces", pyarrow.list_(pyarrow.uint64())),
    ]
)
"""Of PREFIX.parquet, a row a document: the input file and its record, what the record says of its
source and licence, and the hashes of the document's pieces (held_out.py), its own last."""

STATE = "state.json"


class Document(NamedTuple):
    """One document."""

    tokens: NDArray[np.int64]
    """Joint ids."""

    origin: Origin
    """Of the record that it was made from."""

    pieces: list[int]
    """Hashes of its pieces, its own last."""

    lengths: Sequence[int] = ()
    """Tokens of its sequences; none if it is one."""


class Documents(NamedTuple):
    """Documents of one set in a row."""

    tokens: NDArray[np.integer]
    """In the dtype of the set, [num_tokens]."""

    lengths: NDArray[np.int32]
    """Tokens of each sequence, [num_sequences]."""

    counts: NDArray[np.int32]
    """Sequences of each, [num_documents]."""

    rows: list[tuple[Any, ...]]
    """Their rows of :data:`SIDE_TABLE`."""


class Prepared(NamedTuple):
    """What became of a chunk."""

    documents: dict[str, Documents]
    """By slice; the training set is ""."""

    rejected: list[Rejected]
    """Records that became no document."""

    @property
    def bad(self) -> list[Rejected]:
        """Those of `rejected` with which something is wrong."""
        return [each for each in self.rejected if each.is_bad]


def sort_out(
    documents: Iterable[Document], rejected: list[Rejected], held_out: HeldOut, dtype: np.dtype
) -> Prepared:
    """Each of `documents` for the slice that it belongs to."""
    of_slice: dict[str, list[Document]] = {}
    rejected = list(rejected)
    for document in documents:
        if held_out.is_excluded(document.pieces[-1]):
            rejected.append(Rejected(document.origin.where, "it is in an excluded set", False))
        else:
            name = held_out.slice_of(document.pieces[-1])
            of_slice.setdefault(name, []).append(document)
    return Prepared({name: _in_a_row(each, dtype) for name, each in of_slice.items()}, rejected)


def _in_a_row(documents: Sequence[Document], dtype: np.dtype) -> Documents:
    lengths = [each.lengths or [len(each.tokens)] for each in documents]
    return Documents(
        np.concatenate([each.tokens for each in documents]).astype(dtype),
        np.array([length for each in lengths for length in each], dtype=np.int32),
        np.array([len(each) for each in lengths], dtype=np.int32),
        [(*each.origin, each.pieces) for each in documents],
    )


class Place(NamedTuple):
    """Where a run stands in its input."""

    part: int
    """Parts of files that were read."""

    position: Position | None
    """Place in the next one; None is its beginning."""


class Journal:
    """The files of a run that is under way; used in a `with` statement."""

    def __init__(
        self, prefix: Path | str, slices: Sequence[str], identity: Mapping[str, Any]
    ) -> None:
        """Go on with the run of `identity` at PREFIX, or begin it; `slices` are names of sets.

        Raises:
            UsageError: another process is at it.
        """
        self.folder = temporary_name(Path(prefix))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()
        lock = self._open.enter_context((self.folder / "lock").open("w"))
        try:
            # A process's own: workers do not hold it on when this process is killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another process is preparing {prefix}: wait for it") from error
        text = json.dumps({"fields": Documents._fields, **identity}, sort_keys=True)
        self._identity = hashlib.sha256(text.encode()).hexdigest()
        state = self._read_state()
        if state:
            logger.info("%s: goes on where a run before it was stopped", prefix)
        part, position = state.get("place", (0, None))
        self.place = Place(part, position and Position(*position))
        self.num_bad: int = state.get("num_bad", 0)
        sizes = state.get("sizes", {})
        self._slices = list(slices)
        names = [f"{i}.{end}" for i in range(len(slices)) for end in Documents._fields]
        self._streams = {
            name: self._append_to(name, sizes.get(name, 0)) for name in (*names, "rejected")
        }
        self._committed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        if self.folder.is_dir() and not (self.folder / STATE).is_file():
            shutil.rmtree(self.folder)  # nothing to go on with

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            is_whole = all(
                (self.folder / name).stat().st_size >= size for name, size in state["sizes"].items()
            )
            return state if is_whole and state["identity"] == self._identity else {}
        except (FileNotFoundError, ValueError, KeyError):
            return {}

    def _append_to(self, name: str, size: int) -> IO[bytes]:
        path = self.folder / name
        path.touch()
        # Not in append mode, in which a file that was cut off tells its old length.
        stream = self._open.enter_context(path.open("r+b"))
        stream.truncate(size)
        stream.seek(size)
        return stream

    def add(self, prepared: Prepared, place: Place) -> None:
        """Append what became of a chunk; `place` is behind it."""
        for name, documents in prepared.documents.items():
            number = self._slices.index(name)
            for end, values in documents._asdict().items():
                data = _json_lines(values) if end == "rows" else values.tobytes()
                self._streams[f"{number}.{end}"].write(data)
        self._streams["rejected"].write(_json_lines(each._asdict() for each in prepared.rejected))
        self.num_bad += len(prepared.bad)
        self.place = place
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make what was appended count."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        state = {
            "identity": self._identity,
            "place": self.place,
            "num_bad": self.num_bad,
            "sizes": {name: stream.tell() for name, stream in self._streams.items()},
        }
        write_text_atomically(self.folder / STATE, json.dumps(state) + "\n")
        self._committed = time.monotonic()

    def path(self, name: str, end: str) -> Path:
        """The file with what stands in field `end` of the :class:`Documents` of slice `name`."""
        return self.folder / f"{self._slices.index(name)}.{end}"

    def remove(self) -> None:
        """Remove the folder, when everything is in its place."""
        self._open.close()
        shutil.rmtree(self.folder)


def _json_lines(values: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def copy_documents(journal: Journal, name: str, writer: SetWriter, dtype: np.dtype) -> None:
    """Hand the documents of slice `name` to `writer`, in pieces that memory holds easily."""
    no_tokens, none = np.zeros(0, dtype=dtype), np.zeros(0, dtype=np.int32)
    for lengths in _arrays(journal.path(name, "lengths"), none.dtype):
        writer.add(no_tokens, lengths, none)
    for counts in _arrays(journal.path(name, "counts"), none.dtype):
        writer.add(no_tokens, none, counts)
    for tokens in _arrays(journal.path(name, "tokens"), dtype):
        writer.add(tokens, none, none)


def _arrays(path: Path, dtype: np.dtype) -> Iterator[NDArray]:
    with path.open("rb") as stream:
        while data := stream.read(dtype.itemsize * BYTES_AT_ONCE):
            yield np.frombuffer(data, dtype=dtype)


def write_side_table(rows: Path, table: Path) -> None:
    """Write the rows of a journal as a .parquet."""
    temporary = temporary_name(table)
    with rows.open("rb") as stream, pyarrow.parquet.ParquetWriter(temporary, SIDE_TABLE) as writer:
        while lines := list(islice(stream, ROWS_AT_ONCE)):
            columns = zip(*map(json.loads, lines), strict=True)
            arrays = [
                pyarrow.array(values, type=field.type)
                for values, field in zip(columns, SIDE_TABLE, strict=True)
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=SIDE_TABLE))
    publish(temporary, table)
