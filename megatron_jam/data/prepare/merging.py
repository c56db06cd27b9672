"""Shards become one set; side tables and lists of what was left out go along."""

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, temporary_name
from megatron_jam.data.indexed import SetInfo, read_info, write_info
from megatron_jam.data.prepare.held_out import TRAINING
from megatron_jam.data.prepare.running import slice_prefix
from megatron_jam.data.prepare.writing import ROWS_AT_ONCE, SIDE_TABLE
from megatron_jam.data.upkeep import merge_sets
from megatron_jam.tokenizers.vocabulary import JointVocabulary

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.json")


def merge_shards(prefix: str, vocabulary: JointVocabulary) -> list[SetInfo]:
    """Join the shards of PREFIX, and of each slice that was held out of it.

    Raises:
        UsageError: one is missing, of another run, or damaged.
    """
    names = [TRAINING, *read_info(shards_of(prefix)[0]).settings.get("held_out", {})]
    # All are looked at before anything is written.
    found = {name: shards_of(slice_prefix(prefix, name)) for name in names}
    return [merge(shards, slice_prefix(prefix, name), vocabulary) for name, shards in found.items()]


def shards_of(prefix: str) -> list[str]:
    """The PREFIXes of all shards of PREFIX, in order.

    Raises:
        UsageError: there are none, one is missing, or they are of runs with other settings.
    """
    path = Path(prefix)
    found: dict[int, set[int]] = {}
    for each in path.parent.glob(f"{path.name}-*.json"):
        if match := _SHARD.fullmatch(each.name.removeprefix(path.name)):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if len(found) != 1:
        counts = " and ".join(map(str, sorted(found))) or "no"
        raise UsageError(f"{prefix} has shards of {counts} parts; it needs those of one run")
    ((count, numbers),) = found.items()
    if missing := sorted(set(range(count)) - numbers):
        listed = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
        raise UsageError(
            f"{prefix}: of {count} shards {len(missing)} are missing ({listed}): prepare them with "
            f"--shard {missing[0]}/{count}"
        )
    return [f"{prefix}-{number:05d}-of-{count:05d}" for number in range(count)]


def merge(prefixes: Sequence[str], output: str, vocabulary: JointVocabulary) -> SetInfo:
    """Append prepared sets, with their side tables, to the set `output`.

    Raises:
        UsageError: one is missing or damaged, or they do not go together.
    """
    infos = {prefix: read_info(prefix) for prefix in prefixes}
    first = infos[prefixes[0]]
    for prefix, info in infos.items():
        if (info.settings, info.vocabulary_sha256) != (first.settings, first.vocabulary_sha256):
            raise UsageError(
                f"{prefix} and {prefixes[0]} were made with other settings or vocabularies "
                f"({info.settings}, {first.settings}): prepare them alike"
            )
    full = [prefix for prefix, info in infos.items() if info.num_documents]
    Path(f"{output}.json").unlink(missing_ok=True)  # it is not whole from here on
    _join_lists(prefixes, output)
    if not full:
        write_info(output, first)
        return first
    write_rows((batch for prefix in full for batch in side_rows(prefix)), output)
    return merge_sets(full, output, vocabulary)


def _join_lists(prefixes: Iterable[str], output: str) -> None:
    target = Path(f"{output}.rejected.jsonl")
    target.unlink(missing_ok=True)
    lists = [Path(f"{prefix}.rejected.jsonl") for prefix in prefixes]
    if any(each.is_file() for each in lists):
        temporary = temporary_name(target)
        with temporary.open("wb") as stream:
            for each in filter(Path.is_file, lists):
                with each.open("rb") as source:
                    shutil.copyfileobj(source, stream)
        publish(temporary, target)


def side_rows(prefix: str) -> Iterator[pyarrow.RecordBatch]:
    """The side table of a set, some rows at a time.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = Path(f"{prefix}.parquet")
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=ROWS_AT_ONCE)
    except (FileNotFoundError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path} is missing or damaged: prepare the set again") from error


def write_rows(batches: Iterable[pyarrow.RecordBatch], output: str) -> None:
    """Write a side table, in groups of one size however its rows come."""
    path = Path(f"{output}.parquet")
    temporary = temporary_name(path)
    waiting = SIDE_TABLE.empty_table()
    with pyarrow.parquet.ParquetWriter(temporary, SIDE_TABLE) as writer:
        for batch in batches:
            waiting = pyarrow.concat_tables([waiting, pyarrow.Table.from_batches([batch])])
            while len(waiting) >= ROWS_AT_ONCE:
                writer.write_table(waiting[:ROWS_AT_ONCE].combine_chunks())
                waiting = waiting[ROWS_AT_ONCE:]
        if len(waiting):
            writer.write_table(waiting.combine_chunks())
    publish(temporary, path)
