"""One document while it is written: which tokens may come next, and when it is whole."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.document import Tokens, unconditional_prompt
from megatron_jam.tokenizers.vocabulary import IMAGE, TEXT, JointVocabulary


class Legal(IntEnum):
    """What may come next; a row of :func:`legal_table`."""

    TEXT = 0
    """Text or `</s>`."""
    TEXT_OR_BREAK = 1
    """Text, `</s>`, or the `<break>` that begins a picture."""
    CODE = 2
    """A picture's code."""
    BREAK = 3
    """The `<break>` that closes a picture, nothing else."""


def legal_table(vocabulary: JointVocabulary) -> NDArray[np.bool_]:
    """Which ids each :class:`Legal` allows, bool [4, V]."""
    table = np.zeros((len(Legal), vocabulary.size), dtype=np.bool_)
    for kind in (Legal.TEXT, Legal.TEXT_OR_BREAK):
        table[kind] = vocabulary.modality == TEXT
        table[kind, vocabulary.eos] = True
    if vocabulary.has_pictures:
        table[[Legal.TEXT_OR_BREAK, Legal.BREAK], vocabulary.break_] = True
    table[Legal.CODE] = vocabulary.modality == IMAGE
    return table


def codes_left(vocabulary: JointVocabulary, tokens: Tokens, tokens_per_image: int) -> int | None:
    """How many codes the picture that `tokens` [n] end in still needs; None if they end in text.

    0 means that a whole picture lacks its closing `<break>`. A `<break>` closes a picture if it
    follows a code, and begins one otherwise: in every layout of tokenizers/document.py, also where
    a picture without text before it has no `<break>` in front.

    Raises:
        ValueError: more than `tokens_per_image` codes stand at the end in a row.
    """
    is_code = vocabulary.modality[tokens] == IMAGE
    num_codes = int(np.argmin(np.append(is_code[::-1], False)))  # in a row, at the end
    if num_codes > tokens_per_image:
        raise ValueError(f"{num_codes} picture codes in a row, a picture has {tokens_per_image}")
    if num_codes:
        return tokens_per_image - num_codes
    begins = len(tokens) and tokens[-1] == vocabulary.break_ and not is_code[-2:].any()
    return tokens_per_image if begins else None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for every document of a batch."""

    vocabulary: JointVocabulary
    """Which id is what."""

    tokens_per_image: int
    """Codes of a picture."""

    max_positions: int
    """Longest sequence of the model."""

    max_new_tokens: int
    """Tokens after which a document ends, unless it is in a picture."""


class Row:
    """A prompt and what has been written behind it."""

    def __init__(self, rules: Rules, prompt: Tokens, *, index: int) -> None:
        """Begin behind `prompt`, joint ids [n]; `index` is its number among all prompts.

        Raises:
            UsageError: the prompt is no prompt of this vocabulary, or leaves no room.
        """
        self._rules = rules
        prompt = np.asarray(prompt, dtype=np.int64)
        if not prompt.size or prompt.min() < 0 or prompt.max() >= rules.vocabulary.size:
            raise UsageError(f"prompt {index} is empty or has ids beyond the vocabulary")
        try:
            self.codes_left = codes_left(rules.vocabulary, prompt, rules.tokens_per_image)
        except ValueError as error:
            raise UsageError(f"prompt {index}: {error}") from error
        needed = 1 + (self.codes_left or 0)  # a picture is followed by its <break>
        if len(prompt) + needed > rules.max_positions:
            raise UsageError(
                f"prompt {index} has {len(prompt)} tokens and needs room for {needed} more, but the"
                f" model has max_positions {rules.max_positions}; shorten it"
            )
        self.index = index
        self.tokens: list[int] = prompt.tolist()
        self.prompt_length = len(prompt)
        self.done = False

    @property
    def in_picture(self) -> bool:
        """Whether a picture's code comes next."""
        return not self.done and bool(self.codes_left)

    @property
    def legal(self) -> Legal:
        """What may come next."""
        if self.codes_left is not None:
            return Legal.CODE if self.codes_left else Legal.BREAK
        whole_picture = self._rules.tokens_per_image + 2
        fits = len(self.tokens) + whole_picture <= self._rules.max_positions
        return Legal.TEXT_OR_BREAK if fits else Legal.TEXT

    @property
    def unconditional(self) -> list[int]:
        """The stream without text up to, and without, its last token, which is the row's own too:
        `[E] <sentinel:0> [B]` and the codes so far of the picture that the row is in."""
        stream = unconditional_prompt(self._rules.vocabulary).tolist()
        if self.in_picture:
            num_codes = self._rules.tokens_per_image - (self.codes_left or 0)
            stream += self.tokens[len(self.tokens) - num_codes :]
        return stream[:-1]

    @property
    def new_tokens(self) -> Tokens:
        """What has been written."""
        return np.array(self.tokens[self.prompt_length :], dtype=np.int64)

    def push(self, token: int) -> None:
        """Write a legal token."""
        self.tokens.append(token)
        if self.codes_left is not None:
            self.codes_left = self.codes_left - 1 if self.codes_left else None
        elif token == self._rules.vocabulary.break_:
            self.codes_left = self._rules.tokens_per_image
        num_new = len(self.tokens) - self.prompt_length
        full = num_new >= self._rules.max_new_tokens
        full = full or len(self.tokens) >= self._rules.max_positions
        self.done = token == self._rules.vocabulary.eos or (self.codes_left is None and full)
