"""Rows of .parquet, .csv and .tsv files."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_jam.data.prepare.files import Part, Step, grouped, opened, plain_suffix
from megatron_jam.data.prepare.records import MAX_LINE_BYTES, BadRecord, Position, Record

Rows = Iterator[tuple[Record | BadRecord, Position]]


def read_parquet(part: Part, position: Position | None, num_records: int) -> Iterator[Step]:
    """Rows of a .parquet; a part's start and stop count rows."""
    begin = position.offset if position else part.start
    return grouped(_parquet_rows(part, begin, num_records), num_records)


def read_csv(part: Part, position: Position | None, num_records: int) -> Iterator[Step]:
    """Rows of a .csv or .tsv, whose first line has the names of the columns."""
    return grouped(_csv_rows(part, position.number if position else 0), num_records)


def num_rows(path: Path) -> int:
    """Rows of a .parquet."""
    with _parquet(path) as table:
        return table.metadata.num_rows


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRecord(str(path), f"it is not a whole .parquet file ({error})") from error


def _parquet_rows(part: Part, begin: int, num_records: int) -> Rows:
    with _parquet(part.path) as table:
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        stop = sum(sizes) if part.stop is None else part.stop
        starts = [0, *accumulate(sizes)][: len(sizes)]
        groups = [i for i, row in enumerate(starts) if row < stop and row + sizes[i] > begin]
        number = starts[groups[0]] if groups else stop
        for batch in table.iter_batches(batch_size=num_records, row_groups=groups):
            for fields in batch.to_pylist():
                number += 1
                if begin < number <= stop:
                    where = f"{part.path}: row {number}"
                    record = Record(where, str(number), fields, str(part.path))
                    yield record, Position(number, number)


def _csv_rows(part: Part, begin: int) -> Rows:
    csv.field_size_limit(MAX_LINE_BYTES)
    with opened(part.path) as stream:
        # What is not utf-8 is found when the field is looked at.
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(text, delimiter="\t" if plain_suffix(part.path) == ".tsv" else ",")
        try:
            names = next(rows, [])
            for number, row in enumerate(rows, start=1):
                if number > begin:
                    yield _csv_record(part, number, names, row), Position(number, number)
        except csv.Error as error:
            raise BadRecord(str(part.path), f"it is not a table ({error})") from error


def _csv_record(part: Part, number: int, names: list[str], row: list[str]) -> Record | BadRecord:
    where = f"{part.path}: row {number}"
    if len(row) != len(names):
        return BadRecord(where, f"{len(row)} columns, not {len(names)}")
    return Record(where, str(number), dict(zip(names, row, strict=True)), str(part.path))
