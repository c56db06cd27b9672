"""Check prepared sets: everything in them, and that nothing held out stands in a training set."""

from collections.abc import Sequence
from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.data.indexed import open_set
from megatron_jam.data.prepare.held_out import Hashes, HeldOut, own_hashes, set_hashes
from megatron_jam.data.prepare.merging import side_rows
from megatron_jam.data.prepare.text import load_text_folder
from megatron_jam.data.upkeep import verify_set
from megatron_jam.tokenizers.vocabulary import JointVocabulary


def main(prefixes: list[str] | str, text_tokenizer: str, *, held_out: Sequence[str] = ()) -> None:
    """Read sets whole. Say of each that it is well, or what is wrong; then the status is 2.

    Found are files that were cut off, a .bin, .idx, .json or .parquet of another set, changed
    bytes, ids outside of the vocabulary, empty documents, a set of another vocabulary or text
    tokenizer; and documents, or retrieved pairs in them, that stand in a held-out set.

    Args:
        prefixes: PREFIXes of the sets.
        text_tokenizer: folder with the tokenizer.json and vocabulary.json that a model has.
        held_out: PREFIXes of sets of which the others may contain nothing.
    """
    tokenizer, vocabulary = load_text_folder(text_tokenizer)
    names = [prefixes] if isinstance(prefixes, str) else prefixes
    opened = [open_set(prefix, vocabulary) for prefix in held_out]
    excluded = own_hashes(opened, vocabulary)
    wrong: list[str] = []
    for prefix in names:
        try:
            verify(prefix, vocabulary, tokenizer.sha256)
            verify_apart(prefix, vocabulary, excluded)
        except UsageError as error:
            wrong.append(str(error))
    if wrong:
        for message in wrong[1:]:
            logger.error("%s", message)
        raise UsageError(f"{len(wrong)} of {len(names)} sets are not as they should be: {wrong[0]}")


def verify(prefix: str, vocabulary: JointVocabulary, tokenizer_sha256: str) -> None:
    """Raise :class:`UsageError` for the first thing that is wrong with a set."""
    info = verify_set(prefix, vocabulary)
    if info.tokenizer_sha256 != tokenizer_sha256:
        raise UsageError(
            f"{prefix} was prepared with another text tokenizer ({info.tokenizer_sha256[:12]}, not "
            f"{tokenizer_sha256[:12]}): prepare it again"
        )
    if Path(f"{prefix}.parquet").is_file():
        hashes = set_hashes(open_set(prefix, vocabulary), vocabulary)
        for batch in side_rows(prefix):
            for row in batch.column("pieces").to_pylist():
                if next(hashes, None) != row:
                    raise UsageError(f"{prefix}.parquet is of another set: prepare the set again")
        if next(hashes, None) is not None:
            raise UsageError(f"{prefix}.parquet has too few rows: prepare the set again")
    logger.info("%s: well, %d documents, %d tokens", prefix, info.num_documents, info.num_tokens)


def verify_apart(prefix: str, vocabulary: JointVocabulary, excluded: Hashes) -> None:
    """Raise :class:`UsageError` if a set has a piece of those that are held out."""
    if not len(excluded):
        return
    held_out = HeldOut(excluded=excluded)
    for number, hashes in enumerate(set_hashes(open_set(prefix, vocabulary), vocabulary)):
        if any(map(held_out.is_excluded, hashes)):
            raise UsageError(
                f"{prefix}: document {number} stands, or contains what stands, in a held-out set: "
                "prepare it with --held_out.exclude"
            )


if __name__ == "__main__":
    run_command(main)
