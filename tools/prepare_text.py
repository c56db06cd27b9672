"""Prepare a set of texts for training."""

from megatron_jam.config.cli import run_command
from megatron_jam.data.indexed import write_set
from megatron_jam.data.prepare import load_text_folder, text_documents


def main(texts: str, text_tokenizer: str, prefix: str) -> None:
    """Write the texts of a .jsonl file as PREFIX.bin, PREFIX.idx and PREFIX.json.

    Args:
        texts: .jsonl file, {"text": ...} a line.
        text_tokenizer: folder that tools/train_text_tokenizer.py wrote.
        prefix: path of the set, without an ending.
    """
    tokenizer, vocabulary = load_text_folder(text_tokenizer)
    documents = text_documents(texts, tokenizer=tokenizer, vocabulary=vocabulary)
    write_set(
        prefix,
        documents,
        vocabulary=vocabulary,
        tokenizer_sha256=tokenizer.sha256,
        kind="text",
    )


if __name__ == "__main__":
    run_command(main)
