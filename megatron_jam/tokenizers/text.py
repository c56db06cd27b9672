"""Text as BPE ids: a byte-level tokenizer, which reads any string and gives it back unchanged."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, write_text_atomically
from megatron_jam.tokenizers.vocabulary import TEXT_SPECIALS

TOKENIZER_FILE = "tokenizer.json"
MIN_VOCAB_SIZE = len(TEXT_SPECIALS) + 256
"""Every byte has an id of its own, so that nothing is unknown."""


class TextTokenizer:
    """A tokenizer.json whose special tokens no text can bring in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a `tokenizers` tokenizer."""
        # Without this a user's literal "</s>" would become the end of the document.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Train byte-level BPE on `texts`; ids 0-3 are `<s> <pad> </s> <unk>`.

        The result has fewer than `vocab_size` ids if `texts` hold too few pairs to merge.

        Raises:
            UsageError: `vocab_size` has no room for the specials and the 256 bytes.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UsageError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, not {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(TEXT_SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a tokenizer.json.

        Raises:
            UsageError: the file is missing or holds no tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"no tokenizer at {path}: make one with tools/train_text_tokenizer.py")
        return cls.parse(path.read_bytes().decode("utf-8", "replace"), path)

    @classmethod
    def parse(cls, text: str, path: Path) -> Self:
        """Read the text of a tokenizer.json; `path` is for messages.

        Raises:
            UsageError: it is no tokenizer.
        """
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"{path} is not a tokenizer: {error}") from error

    @classmethod
    def from_gpt2(cls, vocab: Path, merges: Path) -> Self:
        """Byte-level BPE out of a vocab.json and a merges.txt, with the ids of vocab.json.

        GPT-2 has these files, and OPT, whose vocab.json has fairseq's order: `<s> <pad> </s>
        <unk>`, then pieces by frequency.

        Raises:
            UsageError: they are no such files, or lack one of the 256 bytes.
        """
        try:
            model = models.BPE.from_file(str(vocab), str(merges))
            ids = read_json(vocab)
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"{vocab} and {merges} are no byte-level BPE: {error}") from error
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if missing := [each for each in alphabet if each not in ids]:
            count = len(missing)
            raise UsageError(f"{vocab} lacks {count} of the 256 bytes, such as {missing[0]!r}")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        marks = [each for each in (*TEXT_SPECIALS, "<|endoftext|>", "<mask>") if each in ids]
        tokenizer.add_special_tokens([AddedToken(each, special=True) for each in marks])
        return cls(tokenizer)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, or None."""
        return self._tokenizer.token_to_id(token)

    @property
    def highest_id(self) -> int:
        """The last id: one less than :attr:`vocab_size` if there are no gaps."""
        return max(self._tokenizer.get_vocab().values())

    def add_special(self, token: str) -> int:
        """The id of a special token, which is added behind all others if it is not there."""
        self._tokenizer.add_special_tokens([AddedToken(token, special=True)])
        return self._tokenizer.get_vocab()[token]

    def save(self, path: Path | str) -> None:
        """Write a tokenizer.json."""
        write_text_atomically(path, self.as_json())

    def as_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special id, whatever stands in `text`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of each text, faster."""
        # The fast one leaves out offsets in the text, which nobody asks for.
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids are left out, broken utf-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def tokens(self) -> dict[str, int]:
        """The id of each token, as the tokenizer spells it."""
        return self._tokenizer.get_vocab()

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return self._tokenizer.get_vocab_size()

    @property
    def sha256(self) -> str:
        """Hex digest of the tokenizer's content, whatever its file's spacing."""
        content = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
