"""Texts to train a tokenizer on."""

from collections.abc import Iterator
from pathlib import Path

from megatron_jam.data.prepare.pairs import CAPTION_FIELDS
from megatron_jam.data.prepare.readers import read_records
from megatron_jam.data.prepare.records import text_of
from megatron_jam.data.prepare.turns import Selection, raw_turns

_ALL = Selection(max_pictures=None)


def read_texts(path: Path | str) -> Iterator[str]:
    """Every text of an input file: questions, answers, articles, captions, texts."""
    for record in read_records(path):
        if record.fields.keys() & {"question", "conversations", "title"}:
            for turn in raw_turns(record, _ALL):
                yield from (text for kind, text in turn if kind == "text")
        else:
            yield text_of(record, *CAPTION_FIELDS)
