"""What is done with whole sets: merged, verified, or taken over from another program."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.data.index_file import Index, chunks, file_sha256, map_tokens, read_index
from megatron_jam.data.indexed import (
    IndexedSet,
    Kind,
    SetInfo,
    SetWriter,
    by_modality,
    count_modalities,
    open_set,
    read_info,
    write_info,
)
from megatron_jam.tokenizers.vocabulary import IMAGE, JointVocabulary


def merge_sets(
    prefixes: Sequence[Path | str], output: Path | str, vocabulary: JointVocabulary
) -> SetInfo:
    """Append the sets one after the other to the set `output`; a copy of bytes and of lengths.

    Raises:
        UsageError: one is missing, was damaged since it was written, or is of another kind,
            vocabulary, tokenizer or other settings than the first.
    """
    infos = [read_info(prefix) for prefix in prefixes]
    for prefix, info in zip(prefixes, infos, strict=True):
        for name in ("kind", "tokenizer_sha256", "image_tokenizer_sha256", "settings"):
            ours, first = getattr(info, name), getattr(infos[0], name)
            if ours != first:
                raise UsageError(
                    f"{prefix} and {prefixes[0]} differ in {name} ({ours!r}, {first!r}): prepare "
                    "them with the same"
                )
    with SetWriter(
        output,
        vocabulary=vocabulary,
        tokenizer_sha256=infos[0].tokenizer_sha256,
        kind=infos[0].kind,
        image_tokenizer_sha256=infos[0].image_tokenizer_sha256,
        settings=infos[0].settings,
    ) as writer:
        for prefix in prefixes:
            _append(open_set(prefix, vocabulary), writer)
        return writer.finish()


def _append(opened: IndexedSet, writer: SetWriter) -> None:
    sha256 = hashlib.sha256()
    no_tokens, none = opened.all_tokens[:0], opened.lengths[:0]
    for lengths in chunks(opened.sequence_lengths):
        writer.add(no_tokens, lengths, none)
    for counts in chunks(opened.sequence_counts):
        writer.add(no_tokens, none, counts)
    for tokens in chunks(opened.all_tokens):
        writer.add(tokens, none, none)
        sha256.update(tokens.data)
    if sha256.hexdigest() != opened.info.sha256["bin"]:
        raise UsageError(f"{opened.prefix}.bin was damaged since it was written: prepare it again")


def describe_set(
    prefix: Path | str,
    *,
    vocabulary: JointVocabulary,
    tokenizer_sha256: str,
    kind: Kind,
    image_tokenizer_sha256: str = "",
) -> SetInfo:
    """Write PREFIX.json for a .bin and .idx that another program of Megatron's wrote.

    Raises:
        UsageError: they are damaged, or an id is outside the vocabulary.
    """
    index = read_index(prefix)
    counts, sha256 = scan_tokens(prefix, index, vocabulary)
    if counts[IMAGE] and not image_tokenizer_sha256:
        raise UsageError(f"{prefix} has pictures: say of which image tokenizer")
    info = SetInfo(
        vocabulary_sha256=vocabulary.sha256,
        tokenizer_sha256=tokenizer_sha256,
        image_tokenizer_sha256=image_tokenizer_sha256,
        kind=kind,
        num_documents=len(index.lengths),
        num_tokens=int(counts.sum()),
        tokens_by_modality=by_modality(counts),
        sha256=sha256,
    )
    write_info(prefix, info)
    return info


def verify_set(prefix: Path | str, vocabulary: JointVocabulary) -> SetInfo:
    """Read the whole set; what its PREFIX.json says, which is then all true.

    Raises:
        UsageError: the first thing that is wrong: what :func:`open_set` finds, an id outside the
            vocabulary, an empty document, a wrong count, or a byte that is not what was written.
    """
    opened = open_set(prefix, vocabulary)
    index = Index(opened.dtype, opened.starts, opened.lengths)
    counts, sha256 = scan_tokens(prefix, index, vocabulary)
    if opened.info.tokens_by_modality != by_modality(counts):
        raise UsageError(
            f"{prefix}.json counts tokens {opened.info.tokens_by_modality}, {prefix}.bin has "
            f"{by_modality(counts)}: prepare the set again"
        )
    for name, found in sha256.items():
        if found != opened.info.sha256.get(name):
            raise UsageError(
                f"{prefix}.{name} is not what {prefix}.json describes, though of its size: it was "
                "damaged or is another set's; prepare the set again"
            )
    return opened.info


def scan_tokens(
    prefix: Path | str, index: Index, vocabulary: JointVocabulary
) -> tuple[NDArray[np.int64], dict[str, str]]:
    """Tokens by modality, int64 [3], and the files' checksums, from all bytes of the set PREFIX.

    Raises:
        UsageError: a document is empty, or a token is no id of the vocabulary.
    """
    if not np.all(index.lengths > 0):
        raise UsageError(f"{prefix}: document {int(np.argmin(index.lengths))} is empty")
    if index.dtype.kind not in "iu":
        raise UsageError(f"{prefix} holds {index.dtype} numbers, which are no token ids")
    counts, sha256, place = np.zeros(3, dtype=np.int64), hashlib.sha256(), 0
    for tokens in chunks(map_tokens(prefix, index.dtype)):
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocabulary.size))
        if wrong.size:
            number = int(np.searchsorted(index.starts, place + wrong[0], side="right")) - 1
            raise UsageError(
                f"{prefix}: document {number} has the id {int(tokens[wrong[0]])}, outside of the "
                f"vocabulary's 0..{vocabulary.size - 1}"
            )
        counts += count_modalities(tokens, vocabulary)
        sha256.update(tokens.data)
        place += len(tokens)
    return counts, {"bin": sha256.hexdigest(), "idx": file_sha256(f"{prefix}.idx")}
