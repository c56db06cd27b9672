"""The concepts of the quickstart: their names, keywords, meanings and captions."""

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import yaml
from wordnet import (
    LEXICOGRAPHER_FILES,
    WORDS,
    Synset,
    WordNet,
    definition,
    noun_phrase,
    sentence,
    verb,
)

from megatron_jam.config.errors import UsageError

CONCEPTS_PER_HELD_OUT = 15
OPTIONS = {"name", "sense", "word", "number", "definition"}
DULL_KEYWORDS = frozenset(WORDS["dull"])


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A thing with a name, a picture and a meaning."""

    name: str
    number: str
    """'singular', 'plural', 'mass' or 'unique': how the name is used in a sentence."""
    category: str
    kind: str
    group: str
    """The category in words: 'tool', 'tools'."""
    character: str
    keywords: tuple[str, ...]
    synset: Synset
    definition: str
    """A sentence."""

    @property
    def key(self) -> str:
        """The name as a slug."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def require(path: Path, package: str) -> None:
    """Raise :class:`UsageError` with the Debian package that has `path`, if it is not there."""
    if not path.is_file():
        raise UsageError(f"no such file: {path} (apt install {package}, or name the file's place)")


def read_annotations(path: Path) -> dict[str, tuple[str, list[str]]]:
    """CLDR's name of an emoji -> (the character, its keywords)."""
    names, keywords = {}, {}
    for annotation in ElementTree.parse(path).iter("annotation"):
        character, text = annotation.get("cp", ""), annotation.text or ""
        if annotation.get("type") == "tts":
            names[text] = character
        else:
            keywords[character] = text.split(" | ")
    return {name: (character, keywords.get(character, [])) for name, character in names.items()}


def read_concepts(
    path: Path, annotations: dict[str, tuple[str, list[str]]], nouns: WordNet
) -> list[Concept]:
    """The concepts of `concepts.yaml`, in its order, with their pictures' names and meanings.

    Raises:
        UsageError: CLDR has no such emoji, WordNet no such noun or the table no such option.
    """
    concepts = []
    for category, table in yaml.safe_load(path.read_text()).items():
        for cldr_name, options in table["concepts"].items():
            if cldr_name not in annotations:
                raise UsageError(f"{path.name}: {cldr_name}: not the name of an emoji in CLDR")
            unknown = set(options or ()) - OPTIONS
            if unknown:
                raise UsageError(f"{path.name}: {cldr_name}: no such option: {unknown}")
            character, keywords = annotations[cldr_name]
            choice = {"name": cldr_name, "number": "singular", **(options or {})}
            name, number = choice["name"], choice["number"]
            synset = choose_sense(choice, keywords, table["senses"], nouns)
            meaning = (
                sentence(noun_phrase(name, number), verb(number), choice["definition"])
                if "definition" in choice
                else definition(name, number, synset.gloss)
            )
            if not meaning:
                raise UsageError(f"{path.name}: {cldr_name}: needs a definition of its own")
            concepts.append(
                Concept(
                    name=name,
                    number=number,
                    category=category,
                    kind=table["kind"],
                    group=table["group"],
                    character=character,
                    keywords=tuple(keywords),
                    synset=synset,
                    definition=meaning,
                )
            )
    return concepts


def choose_sense(choice: dict, keywords: list[str], files: list[str], nouns: WordNet) -> Synset:
    """The sense that the table names, or the one nearest to the category and the keywords.

    The score is the number of keywords in the gloss and the words above it, less 0.6 for each more
    frequent sense and 2 for each lexicographer file that the category prefers.
    """
    word = choice.get("word", choice["name"])
    senses = nouns.senses(word)
    if "sense" in choice:
        if choice["sense"] > len(senses):
            raise UsageError(f"concepts.yaml: {word}: WordNet has but {len(senses)} senses of it")
        return senses[choice["sense"] - 1]
    clues = {part for keyword in keywords for part in keyword.lower().split()} - set(word.split())
    numbers = [LEXICOGRAPHER_FILES[file] for file in files]

    def score(rank: int) -> float:
        synset = senses[rank]
        lemmas = [lemma for above in nouns.kinds(synset)[:4] for lemma in above.lemmas]
        words = set(re.findall("[a-z]+", " ".join([synset.gloss.split('"')[0], *lemmas]).lower()))
        return len(clues & words) - 0.6 * rank - 2 * numbers.index(synset.file)

    ranks = [rank for rank, synset in enumerate(senses) if synset.file in numbers]
    if not ranks:
        raise UsageError(f"concepts.yaml: {word}: WordNet has no such noun among {files}")
    return senses[max(ranks, key=score)]


def choose_held_out(concepts: list[Concept]) -> list[Concept]:
    """One concept in fifteen of each category, those whose keys have the smallest hashes."""
    chosen = set()
    for category in {concept.category for concept in concepts}:
        keys = sorted((c.key for c in concepts if c.category == category), key=digest)
        chosen.update(keys[: max(1, round(len(keys) / CONCEPTS_PER_HELD_OUT))])
    return [concept for concept in concepts if concept.key in chosen]


def digest(text: str) -> str:
    """An order that has nothing to do with the text's meaning."""
    return hashlib.sha256(text.encode()).hexdigest()


def caption(concept: Concept) -> str:
    """'A strawberry: berry, fruit': the name and up to three keywords that say something new.

    The name stands behind its article as it does in texts, so that its tokens are the same there.
    """
    said, words = concept.name.lower(), []
    for word in concept.keywords:
        known = said.split() + [part for other in words for part in other.split()]
        new = not any(alike(part, k) for part in word.split() for k in known)
        if new and word.islower() and word not in DULL_KEYWORDS:
            words.append(word)
    phrase = noun_phrase(concept.name, concept.number)
    return f"{phrase[0].upper()}{phrase[1:]}: {', '.join(words[:3] or [concept.kind])}"


def alike(word: str, other: str) -> bool:
    """Whether two words are one up to an ending."""
    return word.startswith(other[:5]) or other.startswith(word[:5])
