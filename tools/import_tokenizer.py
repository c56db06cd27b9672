"""Take over a text tokenizer, and lay out the joint vocabulary of its text and picture codes."""

from dataclasses import replace
from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary

# How known tokenizers call them; what none of the names is in gets the first one, behind the rest.
NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "pad": ("<pad>", "<|finetune_right_pad_id|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "unk": ("<unk>",),
}


def main(
    source: Path,
    output: Path,
    *,
    num_image_codes: int = 8192,
    num_sentinels: int = 512,
    bos: str | None = None,
    pad: str | None = None,
    eos: str | None = None,
    unk: str | None = None,
) -> None:
    """Write OUTPUT/tokenizer.json and OUTPUT/vocabulary.json. Ids of text stay as they are.

    Args:
        source: a tokenizer.json, or a folder with one, or with vocab.json and merges.txt as GPT-2
            and OPT have them.
        output: folder to write.
        num_image_codes: codes of the image tokenizer that will be used.
        num_sentinels: most spans that the CM3 objective can mask in a sample.
        bos: the tokenizer's own name for <s>; by default the one of some known names that it has,
            else <s> is added.
        pad: the same for <pad>.
        eos: the same for </s>.
        unk: the same for <unk>.
    """
    tokenizer = read_tokenizer(source)
    ids: dict[str, int] = {}
    for kind, name in {"bos": bos, "pad": pad, "eos": eos, "unk": unk}.items():
        if name is not None and tokenizer.id_of(name) is None:
            raise UsageError(f"{source} has no token {name!r}, which is to be {kind}")
        known = [name] if name else [n for n in NAMES[kind] if tokenizer.id_of(n) is not None]
        ids[kind] = tokenizer.add_special((known or NAMES[kind])[0])
    size = tokenizer.vocab_size
    if tokenizer.highest_id >= size:
        raise UsageError(f"{source} has {size} tokens, but ids up to {tokenizer.highest_id}")
    vocabulary = JointVocabulary.build(
        text_size=size, num_image_codes=num_image_codes, num_sentinels=num_sentinels
    )
    vocabulary = replace(vocabulary, **ids)
    tokenizer.save(output / TOKENIZER_FILE)
    vocabulary.save(output / VOCABULARY_FILE)
    logger.info("%s: %d text ids, %d ids, %s", output, size, vocabulary.size, ids)


def read_tokenizer(source: Path) -> TextTokenizer:
    """The tokenizer in a file or folder; :class:`UsageError` if there is none."""
    if source.is_dir() and not (source / TOKENIZER_FILE).is_file():
        return TextTokenizer.from_gpt2(source / "vocab.json", source / "merges.txt")
    return TextTokenizer.load(source / TOKENIZER_FILE if source.is_dir() else source)


if __name__ == "__main__":
    run_command(main)
