"""Train a byte-level BPE and lay out the joint vocabulary of text and picture codes."""

from itertools import chain
from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.log import logger
from megatron_jam.data.prepare.corpus import read_texts
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary


def main(
    inputs: list[str],
    output: str,
    *,
    vocab_size: int = 56320,
    num_image_codes: int = 8192,
    num_sentinels: int = 512,
) -> None:
    """Write OUTPUT/tokenizer.json and OUTPUT/vocabulary.json from the texts of INPUTS.

    Example: tools/train_text_tokenizer.py '[text.jsonl, pairs.tar]' outputs/text_tokenizer

    Args:
        inputs: files to train on, as the prepare tools read them: .jsonl, .parquet, .csv, .tar.
        output: folder to write.
        vocab_size: text ids, special ones included; fewer are made if the texts are few.
        num_image_codes: codes of the image tokenizer that will be used.
        num_sentinels: most spans that the CM3 objective can mask in a sample.
    """
    texts = chain.from_iterable(read_texts(path) for path in inputs)
    tokenizer = TextTokenizer.train(texts, vocab_size)
    vocabulary = JointVocabulary.build(
        text_size=tokenizer.vocab_size,
        num_image_codes=num_image_codes,
        num_sentinels=num_sentinels,
    )
    tokenizer.save(Path(output) / TOKENIZER_FILE)
    vocabulary.save(Path(output) / VOCABULARY_FILE)
    logger.info("%s: %d text ids, %d ids", output, tokenizer.vocab_size, vocabulary.size)


if __name__ == "__main__":
    run_command(main)
