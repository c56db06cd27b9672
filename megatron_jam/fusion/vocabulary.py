"""The vocabulary of a child: for every id its token, and which parent's row it takes.

Tokens are matched by what they are (a text token's string, a code's number, a special token's
role), never by their id: parents may differ in size and order. Rows of padding have no name, so no
id ever takes one.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.model import IMAGE, PAIR, TEXT
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary
from megatron_jam.weights.folder import WeightsFolder

PLAN_FILE = "vocabulary_plan.tsv"
"""A line for each id: id, token, parent, and the parent's row."""
BOTH, DRAWN = "both", "drawn"
"""What an id may take besides TEXT and IMAGE: both parents' rows, or one drawn by its name."""


KINDS = ("text", "special", "image", "sentinel", "unnamed")
"""What an id can stand for. A token is a kind, a space, and a string, a role, a code, an index or
the id: one string, as Python's garbage collector looks at anything else again and again."""


def kind_of(token: str) -> str:
    """One of KINDS."""
    return token.partition(" ")[0]


def shown(token: str) -> str:
    """A token for a reader, on one line."""
    kind, _, value = token.partition(" ")
    if kind == "text":
        return repr(value)[1:-1]
    return f"<{value.rstrip('_')}>" if kind == "special" else f"<{kind}:{value}>"


def tokens_of(vocabulary: JointVocabulary, tokenizer: TextTokenizer) -> list[str]:
    """What each id stands for, whatever its number."""
    tokens = [""] * vocabulary.size
    for string, number in tokenizer.tokens().items():
        if number < vocabulary.text.size:
            tokens[vocabulary.text.start + number] = f"text {string}"
    for kind, ids in (("image", vocabulary.image), ("sentinel", vocabulary.sentinels)):
        tokens[ids.start : ids.stop] = [f"{kind} {index}" for index in range(ids.size)]
    for role, number in vocabulary.singles.items():
        tokens[number] = f"special {role}"
    return [token or f"unnamed {i}" for i, token in enumerate(tokens)]


@dataclass(frozen=True, kw_only=True)
class VocabularyPlan:
    """Which rows the child's token tables are made of."""

    source: Path
    """Folder of the child's vocabulary.json and tokenizer.json."""

    vocabulary: JointVocabulary
    """The child's ids."""

    tokens: list[str]
    """What each stands for."""

    rows: dict[str, NDArray[np.int64]]
    """Each parent's row for each id; -1 where it has none."""

    takes: list[str]
    """TEXT, IMAGE, BOTH or DRAWN for each id."""

    @classmethod
    def make(cls, text: WeightsFolder, image: WeightsFolder, source: Path, *, mixes: bool) -> Self:
        """Match the parents' tokens with those of the child.

        Args:
            text: the LLM.
            image: the image model.
            source: folder of the child's vocabulary.json and tokenizer.json.
            mixes: whether an id takes both rows where both parents have one (averaged, side by
                side, or each in a table of its own). Else text is the LLM's, as are <s>, <pad>,
                </s> and <unk>, and all the rest the image model's, which alone has seen it.
        """
        vocabulary = JointVocabulary.load(source / VOCABULARY_FILE)
        tokenizer = TextTokenizer.load(source / TOKENIZER_FILE)
        tokens = tokens_of(vocabulary, tokenizer)
        rows = {}
        for name, parent in zip(PAIR, (image, text), strict=True):
            own = TextTokenizer.load(parent.tokenizer_path)
            if (parent.vocabulary, own.sha256) == (vocabulary, tokenizer.sha256):
                rows[name] = np.arange(vocabulary.size)
                continue
            known = {t: i for i, t in enumerate(tokens_of(parent.vocabulary, own))}
            places = [-1 if kind_of(t) == "unnamed" else known.get(t, -1) for t in tokens]
            rows[name] = np.array(places, dtype=np.int64)
        has = {name: places >= 0 for name, places in rows.items()}
        prefers = np.zeros(vocabulary.size, dtype=np.bool_)
        prefers[vocabulary.text.start : vocabulary.text.stop] = True
        takes = np.select(
            [has[TEXT] & has[IMAGE] & mixes, has[TEXT] & (prefers | ~has[IMAGE]), has[IMAGE]],
            [BOTH, TEXT, IMAGE],
            DRAWN,
        )
        return cls(
            source=source, vocabulary=vocabulary, tokens=tokens, rows=rows, takes=takes.tolist()
        )

    def is_whole(self, parent: str) -> bool:
        """Whether a parent's rows are the child's, id by id."""
        return bool(np.array_equal(self.rows[parent], np.arange(self.vocabulary.size)))

    def as_tsv(self) -> str:
        """The plan as text: a line for each id."""
        columns = (self.tokens, self.takes, *(self.rows[name].tolist() for name in (TEXT, IMAGE)))
        lines = [
            f"{i}\t{shown(token)}\t{takes}\t{text}\t{image}"
            for i, (token, takes, text, image) in enumerate(zip(*columns, strict=True))
        ]
        return "\n".join(["id\ttoken\ttakes\trow of text\trow of image", *lines]) + "\n"

    def summary(self) -> list[str]:
        """A line for each kind of token: how many ids take whose rows."""
        lines = []
        counts = Counter(zip(map(kind_of, self.tokens), self.takes, strict=True))
        for kind in KINDS:
            taken = {each: counts[kind, each] for each in _WHOSE if counts[kind, each]}
            told = ", ".join(f"{_WHOSE[each]} {count:,}" for each, count in taken.items())
            if taken:
                lines.append(f"{kind} ids {sum(taken.values()):,}: {told}")
        return lines


_WHOSE = {TEXT: "the LLM's rows", IMAGE: "the image model's", BOTH: "both", DRAWN: "drawn anew"}
