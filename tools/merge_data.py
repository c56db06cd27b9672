"""Join the shards of a prepared set, choose some of its documents, or withdraw some."""

from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import open_set
from megatron_jam.data.prepare.choosing import (
    all_kept,
    not_withdrawn,
    select,
    withdrawn_in,
    within_budget,
)
from megatron_jam.data.prepare.merging import merge, merge_shards
from megatron_jam.data.prepare.text import load_text_folder


def main(
    inputs: list[str] | str,
    text_tokenizer: str,
    output: str,
    *,
    tokens: int | None = None,
    seed: int = 0,
    withdraw: Path | None = None,
) -> None:
    """Write OUTPUT.bin, .idx, .json and .parquet.

    Join the shards sets/text-0000i-of-00008, and those of slices held out of them:
        tools/merge_data.py sets/text TOKENIZER sets/text
    Join sets that were made alike:
        tools/merge_data.py '[sets/wikipedia, sets/books]' TOKENIZER sets/text
    Take 30 billion tokens of a set, the same documents at every call:
        tools/merge_data.py sets/text TOKENIZER sets/text_30B --tokens 30_000_000_000

    Args:
        inputs: PREFIXes of sets; or one, of whose shards OUTPUT is made if it is the same.
        text_tokenizer: folder with the vocabulary.json of the sets.
        output: PREFIX of the set to write.
        tokens: most tokens of a random subset of documents; by default all are taken.
        seed: of the order in which documents are taken.
        withdraw: file with a line for each `where`, `source`, `licence` or hash of a piece, as
            PREFIX.parquet has them, whose documents are left out; and where one is a retrieved
            pair of another document, that pair.
    """
    _, vocabulary = load_text_folder(text_tokenizer)
    prefixes = [inputs] if isinstance(inputs, str) else inputs
    chooses = tokens is not None or withdraw is not None
    if prefixes == [output]:
        if chooses:
            raise UsageError("output must be another set than the one that is chosen from")
        merge_shards(output, vocabulary)
        return
    if not chooses:
        merge(prefixes, output, vocabulary)
        return
    if len(prefixes) > 1:
        raise UsageError("join the sets first, then choose from the one that they make")
    (prefix,) = prefixes
    opened = open_set(prefix, vocabulary)
    names = withdrawn_in(withdraw) if withdraw else set()
    kept = not_withdrawn(opened, names) if names else all_kept(opened)
    if tokens is not None:
        kept = within_budget(opened, kept, tokens=tokens, seed=seed)
    reasons = {"tokens": tokens, "seed": seed, "withdrawn": len(names)}
    select(opened, output, kept, vocabulary, reasons)


if __name__ == "__main__":
    run_command(main)
