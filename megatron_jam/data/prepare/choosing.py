"""Some of a set becomes another set: a random subset by tokens, or what is not withdrawn.

What stays is said sequence by sequence, bool [num_sequences]: a document is one sequence, or its
beginning, each retrieved pair and its own pair (tokenizers/document.py), which ends it. A document
goes with its last sequence; a retrieved pair may go alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import IndexedSet, SetInfo, SetWriter
from megatron_jam.data.prepare.merging import side_rows, write_rows
from megatron_jam.tokenizers.vocabulary import JointVocabulary

Kept = NDArray[np.bool_]

_TOKENS_AT_ONCE = 1 << 22


def all_kept(opened: IndexedSet) -> Kept:
    """Nothing goes."""
    return np.ones(len(opened.sequence_lengths), dtype=np.bool_)


def within_budget(opened: IndexedSet, kept: Kept, *, tokens: int, seed: int) -> Kept:
    """A random subset of the documents `kept`, of at most `tokens` tokens.

    The order in which they are taken depends on the seed and their number alone; a smaller budget's
    subset is part of a larger one's.
    """
    lengths = _sums(np.where(kept, opened.sequence_lengths, 0), opened)
    bits = np.random.PCG64(np.random.SeedSequence((seed,))).random_raw(len(lengths))
    order = np.argsort(bits, kind="stable")
    order = order[lengths[order] > 0]
    taken = np.cumsum(lengths[order]) <= tokens
    chosen = np.zeros(len(lengths), dtype=np.bool_)
    chosen[order[taken]] = True
    return kept & np.repeat(chosen, opened.sequence_counts)


def not_withdrawn(opened: IndexedSet, withdrawn: set[str]) -> Kept:
    """What stays when all records of some sources, places or hashes go.

    A document goes whose row of the side table has one of `withdrawn` as `where`, `source` or
    `licence`, or as the hash (decimal) of its own piece. Where such a piece is a retrieved one of
    another document, it alone goes.

    Raises:
        UsageError: there is no side table, or one of `withdrawn` is found nowhere.
    """
    found: set[str] = set()
    pieces: set[int] = {int(each) for each in withdrawn if each.isdecimal()}
    for batch in side_rows(opened.prefix):
        for row in batch.to_pylist():
            names = withdrawn & {row["where"], row["source"], row["licence"]}
            if names:
                found |= names
                pieces.add(row["pieces"][-1])
    kept = all_kept(opened)
    first = 0
    counts = iter(opened.sequence_counts.tolist())
    for batch in side_rows(opened.prefix):
        for hashes in batch.column("pieces").to_pylist():
            count = next(counts, 0)
            if count != len(hashes) + (count > 1):
                raise _unlike(opened)
            gone = pieces.intersection(hashes)
            found |= withdrawn & {str(each) for each in gone}
            if hashes[-1] in gone:
                kept[first : first + count] = False
            elif gone:
                kept[first + 1 : first + count] = [each not in gone for each in hashes]
            first += count
    if first != len(kept):
        raise _unlike(opened)
    if unknown := sorted(withdrawn - found):
        raise UsageError(f"{opened.prefix} has nothing of {unknown[0]!r}, which is to be withdrawn")
    return kept


def withdrawn_in(path: Path) -> set[str]:
    """What a list says is to be withdrawn: a line each, or a JSON string where a name is odd."""
    lines = (line.rstrip("\n") for line in path.open(encoding="utf-8"))
    return {json.loads(line) if line.startswith('"') else line for line in lines if line.strip()}


def select(
    opened: IndexedSet,
    output: str,
    kept: Kept,
    vocabulary: JointVocabulary,
    settings: dict[str, Any],
) -> SetInfo:
    """Write what is `kept` of a set as the set `output`; `settings` says why.

    Raises:
        UsageError: nothing is left, or the side table is another set's.
    """
    info = opened.info
    if not kept.any():
        raise UsageError(f"{output}: there is no document to write")
    if Path(f"{opened.prefix}.parquet").is_file():
        write_rows(_rows_kept(opened, kept), output)
    with SetWriter(
        output,
        vocabulary=vocabulary,
        tokenizer_sha256=info.tokenizer_sha256,
        image_tokenizer_sha256=info.image_tokenizer_sha256,
        kind=info.kind,
        settings=info.settings | {"selected": settings},
    ) as writer:
        writer.add(opened.all_tokens[:0], *_layout(opened, kept))
        none = opened.sequence_counts[:0]
        for tokens in _tokens_kept(opened, kept):
            writer.add(tokens, none, none)
        return writer.finish()


def _firsts(opened: IndexedSet) -> NDArray[np.int64]:
    """Each document's first sequence."""
    counts = opened.sequence_counts
    return np.cumsum(counts, dtype=np.int64) - counts


def _sums(values: NDArray, opened: IndexedSet) -> NDArray[np.int64]:
    """Of a number for each sequence, the sum over each document."""
    return np.add.reduceat(values, _firsts(opened), dtype=np.int64)


def _layout(opened: IndexedSet, kept: Kept) -> tuple[NDArray, NDArray]:
    """Tokens of the sequences that stay, and how many are each document's. One that has lost all
    its retrieved pairs is one sequence, as if it never had any."""
    lengths, counts = opened.sequence_lengths[kept], _sums(kept, opened)
    bare = ((counts == 2) & (opened.sequence_counts > 2))[counts > 0]
    counts = counts[counts > 0]
    begins = (np.cumsum(counts) - counts)[bare]
    lengths[begins + 1] += lengths[begins]
    counts[bare] = 1
    return np.delete(lengths, begins), counts


def _tokens_kept(opened: IndexedSet, kept: Kept) -> Iterator[NDArray]:
    """Sequences in a row, of so many tokens as memory holds easily, or one of them."""
    stops = np.cumsum(opened.sequence_lengths, dtype=np.int64)[kept]
    starts = stops - opened.sequence_lengths[kept]
    ends = np.cumsum(stops - starts)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + _TOKENS_AT_ONCE, side="right"))
        here = slice(first, max(last, first + 1))
        edges = zip(starts[here].tolist(), stops[here].tolist(), strict=True)
        yield np.concatenate([opened.all_tokens[start:stop] for start, stop in edges])
        first = here.stop


def _rows_kept(opened: IndexedSet, kept: Kept) -> Iterator[pyarrow.RecordBatch]:
    """The side table, with the pieces that stay."""
    begins = _firsts(opened)[opened.sequence_counts > 1]  # which are no pieces
    stays = np.delete(kept, begins)
    first = 0
    for batch in side_rows(opened.prefix):
        column = batch.column("pieces")
        pieces = column.flatten()
        here = stays[first : first + len(pieces)]
        if len(here) < len(pieces):
            raise _unlike(opened)
        first += len(pieces)
        stops = np.cumsum(pyarrow.compute.list_value_length(column).to_numpy())
        edges = np.append(0, np.cumsum(here))[np.append(0, stops)]
        left = pyarrow.ListArray.from_arrays(
            pyarrow.array(edges, pyarrow.int32()), pieces.filter(pyarrow.array(here))
        )
        number = batch.schema.get_field_index("pieces")
        rows = batch.set_column(number, batch.schema.field(number), left)
        yield rows.filter(pyarrow.array(np.diff(edges) > 0))
    if first != len(stays):
        raise _unlike(opened)


def _unlike(opened: IndexedSet) -> UsageError:
    return UsageError(f"{opened.prefix}.parquet is of another set: prepare the set again")
