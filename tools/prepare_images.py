"""Prepare a set of captions with images for training."""

from megatron_jam.config.cli import run_command
from megatron_jam.data.indexed import write_set
from megatron_jam.data.prepare import load_text_folder, pair_documents
from megatron_jam.parallel.device import select_device
from megatron_jam.tokenizers.image import ImageTokenizer


def main(
    pairs: str, text_tokenizer: str, image_tokenizer: str, prefix: str, *, batch_size: int = 64
) -> None:
    """Write the pairs of a WebDataset .tar as PREFIX.bin, PREFIX.idx and PREFIX.json.

    Args:
        pairs: .tar file with a .txt and a .png, .jpg or .webp of each key.
        text_tokenizer: folder that tools/train_text_tokenizer.py wrote.
        image_tokenizer: folder that tools/train_image_tokenizer.py wrote.
        prefix: path of the set, without an ending.
        batch_size: pictures encoded at a time.
    """
    tokenizer, vocabulary = load_text_folder(text_tokenizer)
    images = ImageTokenizer.load(image_tokenizer).to(select_device())
    documents = pair_documents(
        pairs,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        image_tokenizer=images,
        batch_size=batch_size,
    )
    write_set(
        prefix,
        documents,
        vocabulary=vocabulary,
        tokenizer_sha256=tokenizer.sha256,
        image_tokenizer_sha256=images.sha256,
        kind="pairs",
    )


if __name__ == "__main__":
    run_command(main)
