"""Prepare a set of captions with images for training."""

from megatron_jam.config.cli import run_command
from megatron_jam.data.prepare.held_out import HeldOut, HeldOutConfig
from megatron_jam.data.prepare.pairs import PairJob
from megatron_jam.data.prepare.pictures import EncodingConfig, ImageEncoding
from megatron_jam.data.prepare.running import OnBad, Run, Shard
from megatron_jam.data.prepare.sheet import write_sheet
from megatron_jam.data.prepare.text import load_text_folder
from megatron_jam.parallel.device import select_device


def main(
    inputs: list[str] | str,
    text_tokenizer: str,
    image_tokenizer: str,
    prefix: str,
    *,
    encoding: EncodingConfig = EncodingConfig(),
    retrieved: int = 0,
    sheet: int = 24,
    bad: OnBad = "skip",
    workers: int | None = None,
    shard: str | None = None,
    held_out: HeldOutConfig = HeldOutConfig(),
) -> None:
    """Write pairs as PREFIX.bin, PREFIX.idx and PREFIX.json; PREFIX.parquet says whence each is.

    A run that was killed goes on where it was when it is started again in the same way.

    Args:
        inputs: one or more WebDataset .tar files (a .txt and a .png, .jpg or .webp of each key, and
            perhaps a .json with more fields), .parquet, .jsonl or .csv files with captions
            (caption or text) and pictures (image: a file's content, or its name beside the table)
            or codes (codes: whole numbers; or a text <img alt="caption" src="I5 I81 ...">), or
            folders that have a metadata.csv, .jsonl or .parquet.
        text_tokenizer: folder with tokenizer.json and vocabulary.json.
        image_tokenizer: folder of the image tokenizer; if all pictures are codes, a name for what
            made them.
        prefix: path of the set, without an ending.
        encoding: how pictures are encoded.
        retrieved: most of a record's `retrieved` records that are kept in front of it; of these a
            run draws as many as its data.sets say (retrieved.most), anew in each epoch.
        sheet: pictures shown, each with what its codes keep of it, in PREFIX.png; 0 for no sheet.
        bad: stop at a record that cannot be used, or skip it: PREFIX.rejected.jsonl lists them.
        workers: processes; by default one a core. The output does not depend on it.
        shard: i/n: the i-th of n parts, i from 0, as PREFIX-0000i-of-0000n; tools/merge_data.py
            joins them.
        held_out: what is kept out of the set.
    """
    tokenizer, vocabulary = load_text_folder(text_tokenizer)
    images = ImageEncoding.of(image_tokenizer, vocabulary, encoding, select_device)
    job = PairJob(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        images=images,
        retrieved=retrieved,
        held_out=HeldOut.of(held_out, vocabulary),
    )
    run = Run(inputs=inputs, prefix=prefix, shard=Shard.parse(shard), workers=workers, bad=bad)
    run.prepare(job)
    if sheet and images.tokenizer:
        write_sheet(run, job, sheet)


if __name__ == "__main__":
    run_command(main)
