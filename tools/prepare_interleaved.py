"""Prepare a set of questions with illustrated answers, conversations or articles for training."""

from megatron_jam.config.cli import run_command
from megatron_jam.data.prepare.held_out import HeldOut, HeldOutConfig
from megatron_jam.data.prepare.interleaved import InterleavedJob, choose_articles
from megatron_jam.data.prepare.pictures import EncodingConfig, ImageEncoding
from megatron_jam.data.prepare.running import OnBad, Run, Shard
from megatron_jam.data.prepare.store import PictureStore
from megatron_jam.data.prepare.text import load_text_folder
from megatron_jam.data.prepare.turns import Selection
from megatron_jam.parallel.device import select_device


def main(
    inputs: list[str] | str,
    text_tokenizer: str,
    prefix: str,
    *,
    pictures: list[str] | str | None = None,
    image_tokenizer: str | None = None,
    encoding: EncodingConfig = EncodingConfig(),
    selection: Selection = Selection(),
    bad: OnBad = "stop",
    workers: int | None = None,
    shard: str | None = None,
    held_out: HeldOutConfig = HeldOutConfig(),
) -> None:
    """Write documents as PREFIX.bin, .idx and .json; PREFIX.parquet says whence each is.

    A record, in a .jsonl, .parquet, .csv or .tar, is {"question": text, "answer": [{"text": text},
    {"image": name}, ...]}; {"conversations": [question, answer, ...]} as in LIMA; or an article in
    the style of wikiHow, {"title": text, "text1": text, "image1": name, "text2": ..., "category":
    text, "rating": number}, whose title becomes the question and whose "This article" becomes
    "The following answer". A run that was killed goes on where it was.

    Args:
        inputs: one or more files, or patterns of names.
        text_tokenizer: folder with tokenizer.json and vocabulary.json.
        prefix: path of the set, without an ending.
        pictures: .tar files or folders with the pictures that records name, by key or file name.
        image_tokenizer: folder of the image tokenizer; if all pictures are codes ({"codes": ...},
            or "I5 I81 ..." for an image), a name for what made them.
        encoding: how pictures are encoded.
        selection: what is taken.
        bad: stop at a record that cannot be used, or skip it: PREFIX.rejected.jsonl lists them.
        workers: processes; by default one a core. The output does not depend on it.
        shard: i/n: the i-th of n parts, i from 0, as PREFIX-0000i-of-0000n; tools/merge_data.py
            joins them.
        held_out: what is kept out of the set.
    """
    tokenizer, vocabulary = load_text_folder(text_tokenizer)
    images = image_tokenizer and ImageEncoding.of(
        image_tokenizer, vocabulary, encoding, select_device
    )
    run = Run(inputs=inputs, prefix=prefix, shard=Shard.parse(shard), workers=workers, bad=bad)
    job = InterleavedJob(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        images=images or None,
        pictures=PictureStore([pictures] if isinstance(pictures, str) else pictures or []),
        selection=selection,
        held_out=HeldOut.of(held_out, vocabulary),
    )
    run.prepare(choose_articles(job, run.files()))


if __name__ == "__main__":
    run_command(main)
