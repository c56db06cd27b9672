"""WordNet's noun files, and its glosses as English sentences."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

# Lists of words, each explained there.
WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text())
# Lexicographer files of nouns, by the number that stands in data.noun (lexnames(5WN)).
LEXICOGRAPHER_FILES = {name: number for number, name in enumerate(WORDS["files"], start=3)}
ABSTRACT = frozenset(WORDS["abstract"])
ARTICLES = ("a", "an", "any", "one")
DETERMINERS = ("the", "each", "either", "some", "two", "several")
MASS_HEADS = frozenset(WORDS["mass"])
HEAD_END = re.compile(
    r"[,:] | (?:of|with|having|that|which|native|found|in|from|for|used|made|on|by|to|who|whose|"
    r"grown|eaten|served|at|worn|usually|often|where|"
    r"when|\w+ing|cultivated|related|similar|covered|designed|filled|cooked|baked) "
)
# Clauses of a gloss that can follow "It is".
CONTINUATION = re.compile(
    r"(?:an?|any|the|used|native|found|made|similar|related|valued|grown|cultivated|served|eaten|"
    r"worn|played|(?:usually|often|sometimes|widely|formerly|closely|chiefly) \w+ed)\b"
)
AN_WORD = re.compile(r"(?!(?:uni(?!n)|us[aeiu]|ut[ei]|ubi|uk|ura|eu|ewe|one\b|once\b))[aeiou]"
                     r"|hour|heir|herb\b|honest|honou?r|x-|suv\b", re.IGNORECASE)  # fmt: skip
CLAUSE = re.compile(
    r",? (?:and (?:is |having |used )|which |that |who |having |with |used |where |when |"
    r"usually |especially |often |in |for |by |consisting |made |as |on |to |from |or )|, "
)


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One meaning: its words, the synsets above it and its definition."""

    offset: int
    file: int
    """Lexicographer file, a value of :data:`LEXICOGRAPHER_FILES`."""
    lemmas: tuple[str, ...]
    hypernyms: tuple[int, ...]
    gloss: str


class WordNet:
    """The nouns of WordNet 3.0, read from its `data.noun` and `index.noun` (wndb(5WN))."""

    def __init__(self, folder: Path) -> None:
        self.synsets = {}
        for line in _records(folder / "data.noun"):
            synset = _parse_synset(line)
            self.synsets[synset.offset] = synset
        self._senses: dict[str, list[int]] = {}
        for line in _records(folder / "index.noun"):
            fields = line.split()
            num_senses = int(fields[2])
            self._senses[fields[0]] = [int(offset) for offset in fields[-num_senses:]]

    def senses(self, lemma: str) -> list[Synset]:
        """The meanings of a noun, the most frequent first; empty for an unknown noun."""
        return [self.synsets[o] for o in self._senses.get(lemma.lower().replace(" ", "_"), ())]

    def hypernyms(self, synset: Synset) -> list[Synset]:
        """The chain above a synset, the nearest first, by each one's first hypernym."""
        chain = []
        while synset.hypernyms:
            synset = self.synsets[synset.hypernyms[0]]
            chain.append(synset)
        return chain

    def kinds(self, synset: Synset) -> list[Synset]:
        """The chain above a synset as far as it says something, the nearest first."""
        chain = self.hypernyms(synset)
        end = next((i for i, above in enumerate(chain) if above.lemmas[0] in ABSTRACT), None)
        return chain[:end]


def _records(path: Path) -> list[str]:
    # The licence at the head of the files is indented by two spaces.
    return [line for line in path.read_text().splitlines() if not line.startswith("  ")]


def _parse_synset(line: str) -> Synset:
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    num_words = int(fields[3], 16)
    words = fields[4 : 4 + 2 * num_words : 2]
    pointers = fields[5 + 2 * num_words :]
    return Synset(
        offset=int(fields[0]),
        file=int(fields[1]),
        lemmas=tuple(word.replace("_", " ") for word in words),
        hypernyms=tuple(
            int(pointers[i + 1]) for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")
        ),
        gloss=gloss.strip(),
    )


def segments(gloss: str) -> list[str]:
    """The clauses of a gloss, without examples and remarks in brackets."""
    gloss = re.sub(r'[,:]?\s*"[^"]*("|$)', " ", gloss)
    gloss = re.sub(r"\([^)]*\)", " ", gloss)
    parts = [re.sub(r"\s+", " ", part).strip(" ,:.") for part in re.split("[;:]", gloss)]
    return [re.sub(r" ([,.])", r"\1", part) for part in parts if len(part.split()) > 1]


def shorten(text: str, num_words: int) -> str:
    """The text up to its last clause border within `num_words` words ('' if there is none)."""
    if len(text.split()) <= num_words:
        return text
    cuts = [m.start() for m in CLAUSE.finditer(text)]
    fitting = [text[:cut] for cut in cuts if 4 <= len(text[:cut].split()) <= num_words]
    return fitting[-1] if fitting else ""


def with_article(phrase: str) -> str:
    """`phrase` behind its indefinite article."""
    return f"{'an' if AN_WORD.match(phrase) else 'a'} {phrase}"


def noun_phrase(name: str, number: str) -> str:
    """A name as the subject of a sentence: 'a strawberry', 'scissors', 'bread', 'the sun'."""
    if number == "unique":
        return f"the {name}"
    return with_article(name) if number == "singular" else name


def sentence(*words: str) -> str:
    """The words as a sentence: a capital in front, a full stop behind."""
    text = " ".join(words)
    return f"{text[0].upper()}{text[1:]}."


def verb(number: str) -> str:
    """'is' or 'are'."""
    return "are" if number == "plural" else "is"


def head_noun(clause: str) -> str:
    """The word that a gloss's clause is about: 'fruit' of 'a sweet fruit with red skin'."""
    words = HEAD_END.split(clause, maxsplit=1)[0].split()
    return words[-1] if words else ""


def definition(name: str, number: str, gloss: str, *, num_words: int = 25) -> str:
    """A gloss's first clause as a sentence of at most `num_words` words ('' if it has none)."""
    subject = noun_phrase(name, number)
    clauses = segments(gloss)
    clause = shorten(clauses[0], num_words - len(subject.split()) - 2) if clauses else ""
    if not clause:
        return ""
    bare = clause.split()[0] not in (*ARTICLES, *DETERMINERS)
    if number == "singular" and bare and head_noun(clause) not in MASS_HEADS:
        clause = with_article(clause)
    return sentence(subject, verb(number), clause)


def remarks(number: str, gloss: str) -> list[str]:
    """The further clauses of a gloss that make a sentence of their own."""
    subject = "They are" if number == "plural" else "It is"
    return [
        sentence(subject, clause)
        for clause in segments(gloss)[1:]
        if CONTINUATION.match(clause) and len(clause.split()) <= 25
    ]


def chain_sentence(name: str, number: str, kinds: list[Synset]) -> str:
    """A strawberry is a kind of berry, which is a kind of edible fruit."""
    chain = ", which is a kind of ".join(above.lemmas[0] for above in kinds)
    return sentence(noun_phrase(name, number), verb(number), "a kind of", chain)


def countability(wordnet: WordNet, synset: Synset) -> str | None:
    """'singular' or 'mass' by the head noun of the gloss; None if the gloss does not tell."""
    clauses = segments(synset.gloss)
    if not clauses:
        return None
    head = head_noun(clauses[0])
    if head in MASS_HEADS:
        return "mass"
    above = {lemma.split()[-1] for kind in wordnet.hypernyms(synset) for lemma in kind.lemmas}
    first = clauses[0].split()[0]
    if first in ARTICLES or (head in above and first not in DETERMINERS):
        return "singular"
    return None
