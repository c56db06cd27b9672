"""Prepare a set of texts for training."""

from megatron_jam.config.cli import run_command
from megatron_jam.data.prepare.held_out import HeldOut, HeldOutConfig
from megatron_jam.data.prepare.running import OnBad, Run, Shard
from megatron_jam.data.prepare.text import TextJob, load_text_folder


def main(
    inputs: list[str] | str,
    text_tokenizer: str,
    prefix: str,
    *,
    text_field: str = "text",
    bad: OnBad = "stop",
    workers: int | None = None,
    shard: str | None = None,
    held_out: HeldOutConfig = HeldOutConfig(),
) -> None:
    """Write texts as PREFIX.bin, PREFIX.idx and PREFIX.json; PREFIX.parquet says whence each is.

    A run that was killed goes on where it was when it is started again in the same way.

    Example: tools/prepare_text.py '[wikipedia.jsonl.zst, "cc/*.parquet"]' TOKENIZER sets/text

    Args:
        inputs: one or more .jsonl, .parquet, .csv or .tsv files, also .gz or .zst (not .parquet),
            or patterns of names; a record a line or row, with fields text, and if known source
            and licence.
        text_tokenizer: folder with tokenizer.json and vocabulary.json.
        prefix: path of the set, without an ending.
        text_field: name of the field with the text.
        bad: stop at a record that cannot be used, or skip it: PREFIX.rejected.jsonl lists them.
        workers: processes; by default one a core. The output does not depend on it.
        shard: i/n: the i-th of n parts, i from 0, as PREFIX-0000i-of-0000n; tools/merge_data.py
            joins them.
        held_out: what is kept out of the set.
    """
    tokenizer, vocabulary = load_text_folder(text_tokenizer)
    job = TextJob(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        text_field=text_field,
        held_out=HeldOut.of(held_out, vocabulary),
    )
    run = Run(inputs=inputs, prefix=prefix, shard=Shard.parse(shard), workers=workers, bad=bad)
    run.prepare(job)


if __name__ == "__main__":
    run_command(main)
