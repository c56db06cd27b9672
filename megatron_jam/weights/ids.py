"""The ids of another program's checkpoint, and those here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_jam.tokenizers.named import has_image_tokens, read_named
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import TOKENIZER, VOCABULARY, tokenizer_files


@dataclass(frozen=True, kw_only=True)
class Ids:
    """The ids of a checkpoint, and those here."""

    vocabulary: JointVocabulary
    """Which id is what here."""

    files: Mapping[str, bytes]
    """vocabulary.json and tokenizer.json."""

    order: Tensor | None
    """The checkpoint's id of each id here, int64; None where they are the same."""

    def rows(self, of: Tensor) -> Tensor:
        """Rows of a table of the checkpoint's in the order of the ids here."""
        return of if self.order is None else of[self.order]


def read_ids(folder: Path) -> Ids:
    """The ids of a tokenizer's folder: by its vocabulary.json, or else by the names of its tokens.

    Raises:
        UsageError: it has neither a vocabulary.json nor tokens that are named as image codes.
    """
    path = folder / TOKENIZER
    if not (folder / VOCABULARY).is_file() and path.is_file() and has_image_tokens(path):
        named = read_named(path)
        texts = {VOCABULARY: named.vocabulary.as_json(), TOKENIZER: named.text.as_json()}
        files = {name: text.encode() for name, text in texts.items()}
        return Ids(vocabulary=named.vocabulary, files=files, order=torch.tensor(named.ids))
    vocabulary = JointVocabulary.load(folder / VOCABULARY)
    return Ids(vocabulary=vocabulary, files=tokenizer_files(folder), order=None)
