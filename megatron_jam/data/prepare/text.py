"""Texts become documents."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.held_out import piece_hash, pieces
from megatron_jam.data.prepare.job import Job, sift
from megatron_jam.data.prepare.records import Chunk, Origin, Rejected, origin_of, text_of
from megatron_jam.data.prepare.writing import Document, Prepared, sort_out
from megatron_jam.tokenizers.document import text_document
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary


def load_text_folder(folder: Path | str) -> tuple[TextTokenizer, JointVocabulary]:
    """The tokenizer and the vocabulary that tools/train_text_tokenizer.py wrote.

    Raises:
        UsageError: one is missing, or they do not belong together.
    """
    tokenizer = TextTokenizer.load(Path(folder) / TOKENIZER_FILE)
    vocabulary = JointVocabulary.load(Path(folder) / VOCABULARY_FILE)
    if tokenizer.vocab_size != vocabulary.text.size:
        raise UsageError(
            f"{folder}: {TOKENIZER_FILE} has {tokenizer.vocab_size} ids, but {VOCABULARY_FILE} "
            f"counts {vocabulary.text.size} text ids: make them again together"
        )
    return tokenizer, vocabulary


@dataclass(frozen=True, kw_only=True)
class TextJob(Job):
    """A text document of each record."""

    kind = "text"

    text_field: str = "text"
    """The field that has the text."""

    def settings(self) -> dict[str, Any]:
        """What the documents depend on."""
        return {"text_field": self.text_field, **super().settings()}

    def read(self, chunk: Chunk) -> tuple[list[tuple[Origin, list[int]]], list[Rejected]]:
        """The ids of each text, and what is no text."""
        found, rejected = sift(chunk, lambda r: (origin_of(r), text_of(r, self.text_field)))
        ids = self.tokenizer.encode_batch([text for _, text in found])
        return [(origin, each) for (origin, _), each in zip(found, ids, strict=True)], rejected

    def finish(self, read: tuple[list[tuple[Origin, list[int]]], list[Rejected]]) -> Prepared:
        """The documents."""
        documents, rejected = [], list(read[1])
        for origin, ids in read[0]:
            try:
                tokens = text_document(self.vocabulary, ids)
            except ValueError as error:  # <unk> of a tokenizer that is not byte-level
                rejected.append(Rejected(origin.where, str(error)))
                continue
            hashes = [piece_hash(each) for each in pieces(self.vocabulary, tokens, self.kind)]
            documents.append(Document(tokens, origin, hashes))
        return sort_out(documents, rejected, self.held_out, self.dtype)
