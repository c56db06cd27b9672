"""Build the quickstart's data: an illustrated dictionary of everyday things.

Pictures are drawn with the Noto colour emoji font, their names and keywords are Unicode CLDR's and
the definitions WordNet's. The same sources give the same bytes.
"""

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from concepts import (
    Concept,
    caption,
    choose_held_out,
    digest,
    read_annotations,
    read_concepts,
    require,
)
from PIL import Image, ImageDraw, ImageFont
from wordnet import (
    LEXICOGRAPHER_FILES,
    WORDS,
    Synset,
    WordNet,
    chain_sentence,
    countability,
    definition,
    noun_phrase,
    remarks,
    sentence,
    verb,
)

from megatron_jam.config.cli import run_command
from megatron_jam.config.log import logger

HERE = Path(__file__).parent
IMAGE_SIZE = 64
FONT_SIZE = 109  # the only size that the font's bitmaps have
NUM_RELATIVES = 2
MAX_KINDS = 3
MAX_SHARED_KINDS = 5
VAGUE = frozenset(WORDS["vague"])
# Other nouns of the text corpus, by lexicographer file, and those held out of it.
NUM_OTHER_NOUNS = {"animal": 450, "artifact": 650, "food": 350, "plant": 350}
NUM_OTHER_HELD_OUT = 100
# One or two words in lower case, no plural.
EVERYDAY_NAME = re.compile(r"[a-z]{3,}(?:[ -][a-z]+)?(?<![^su]s)")
UNSUITABLE = re.compile(
    r"sex|penis|vagina|genital|prostitut|brothel|offensive|obscene|contracepti|narcotic|torture|"
    r"nazi|slave|execution|excrement|toilet|death|kill|condom|buttock|urin|drug|inhibitor|tumor|"
    r"bacteri|virus|disease|ism\b"
)
PICTURE = {"source": "Noto Color Emoji; Unicode CLDR", "licence": "OFL-1.1; Unicode-DFS-2016"}
CONCEPT_TEXT = {"source": "WordNet 3.0; Unicode CLDR", "licence": "WordNet-3.0; Unicode-DFS-2016"}
NOUN_TEXT = {"source": "WordNet 3.0", "licence": "WordNet-3.0"}
FONT_PACKAGE = "fonts-noto-color-emoji"
ANNOTATIONS_PACKAGE = "unicode-cldr-core"
WORDNET_PACKAGE = "wordnet-base"


def main(
    output: Path = HERE / "data",
    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    annotations: Path = Path("/usr/share/unicode/cldr/common/annotations/en.xml"),
    wordnet: Path = Path("/usr/share/wordnet"),
) -> None:
    """Build the quickstart's data from the Noto emoji font, Unicode CLDR and WordNet.

    Args:
        output: Folder of the built files.
        font: The colour font (Debian package fonts-noto-color-emoji).
        annotations: CLDR's English names and keywords (Debian package unicode-cldr-core).
        wordnet: Folder of data.noun and index.noun (Debian package wordnet-base).
    """
    require(font, FONT_PACKAGE)
    require(annotations, ANNOTATIONS_PACKAGE)
    require(wordnet / "data.noun", WORDNET_PACKAGE)
    require(wordnet / "index.noun", WORDNET_PACKAGE)
    nouns = WordNet(wordnet)
    concepts = read_concepts(HERE / "concepts.yaml", read_annotations(annotations), nouns)
    held_out = choose_held_out(concepts)
    trained = [concept for concept in concepts if concept not in held_out]
    others = other_nouns(nouns, concepts)
    output.mkdir(parents=True, exist_ok=True)
    typeface = ImageFont.truetype(str(font), FONT_SIZE)
    for suffix, part, other in (
        ("", trained, others[NUM_OTHER_HELD_OUT:]),
        ("_heldout", held_out, others[:NUM_OTHER_HELD_OUT]),
    ):
        write_pairs(output / f"pairs{suffix}.tar", part, typeface)
        texts = [concept_text(concept, nouns) for concept in part] + other
        write_lines(output / f"text{suffix}.jsonl", texts)
        answers = [question_and_answer(concept, trained, nouns) for concept in part]
        write_lines(output / f"interleaved{suffix}.jsonl", answers)
    write_file(output / "SOURCES.md", sources().encode())
    logger.info("%d concepts and %d held out, in %s", len(trained), len(held_out), output)


def picture(character: str, font: ImageFont.FreeTypeFont) -> bytes:
    """The emoji on white, cropped to a square with a small margin, as a 64x64 RGB PNG."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((20, 20), character, font=font, embedded_color=True)
    left, top, right, bottom = canvas.getbbox()
    side = round(1.06 * max(right - left, bottom - top))
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    corner = ((side - right + left) // 2, (side - bottom + top) // 2)
    square.alpha_composite(canvas.crop((left, top, right, bottom)), corner)
    small = square.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def concept_text(concept: Concept, nouns: WordNet) -> dict[str, str]:
    """All that is known about a concept, as one text."""
    kinds = nouns.kinds(concept.synset)[:MAX_KINDS]
    words = caption(concept).split(": ")[1].split(", ")
    phrase = noun_phrase(concept.name, concept.number)
    goes_with = "goes with the words" if len(words) > 1 else "goes with the word"
    sentences = [
        question(concept.name, concept.number),
        concept.definition,
        *remarks(concept.number, concept.synset.gloss)[:2],
        chain_sentence(concept.name, concept.number, kinds) if kinds else "",
        sentence("a picture of", phrase, goes_with, " and ".join(words)),
    ]
    return {"id": concept.key, "text": " ".join(filter(None, sentences)), **CONCEPT_TEXT}


def question(name: str, number: str) -> str:
    """'What is a strawberry?'"""
    return f"What {verb(number)} {noun_phrase(name, number)}?"


def question_and_answer(concept: Concept, trained: list[Concept], nouns: WordNet) -> dict:
    """'What is a strawberry?' and its definition, picture and relatives."""
    return {
        "id": concept.key,
        "question": question(concept.name, concept.number),
        "answer": [
            {"text": concept.definition},
            {"image": concept.key},
            {"text": relatives_sentence(concept, trained, nouns)},
        ],
    }


def relatives_sentence(concept: Concept, trained: list[Concept], nouns: WordNet) -> str:
    """The nearest kind that trained concepts share, and two of those.

    'A strawberry is a kind of berry, like the blueberry.' Where the kinds are the concept's alone,
    they stand alone; where WordNet has none that says something, the category takes their place.
    """
    phrase = noun_phrase(concept.name, concept.number)
    kinds = nouns.kinds(concept.synset)
    candidates = [other for other in trained if other.key != concept.key]
    candidates.sort(key=lambda other: digest(concept.key + other.key))
    for above in kinds[:MAX_SHARED_KINDS]:
        # A relative is no kind of the concept, nor the concept one of it.
        family = [
            other
            for other in candidates
            if above in nouns.kinds(other.synset)
            and concept.synset not in nouns.kinds(other.synset)
            and other.synset not in kinds
        ]
        family.sort(key=lambda other: nouns.kinds(other.synset).index(above))
        if family and above.lemmas[0] not in VAGUE:
            like = f"{above.lemmas[0]}, like {listed(family)}"
            return sentence(phrase, verb(concept.number), "a kind of", like)
    if kinds:
        return chain_sentence(concept.name, concept.number, kinds[:MAX_KINDS])
    family = [other for other in candidates if other.category == concept.category]
    belong = "belong" if concept.number == "plural" else "belongs"
    return sentence(phrase, belong, "among", f"the {concept.group}, with {listed(family)}")


def listed(concepts: list[Concept]) -> str:
    """'the tiger and scissors': the first two."""
    names = [c.name if c.number in ("plural", "mass") else f"the {c.name}" for c in concepts]
    return " and ".join(names[:NUM_RELATIVES])


def other_nouns(nouns: WordNet, concepts: list[Concept]) -> list[dict[str, str]]:
    """Texts about other nouns of the concepts' branches, in an order of no meaning."""
    names = {concept.name for concept in concepts}
    taken = {concept.synset.offset for concept in concepts}
    texts = []
    for file, count in NUM_OTHER_NOUNS.items():
        found = []
        for synset in nouns.synsets.values():
            name = synset.lemmas[0]
            if (
                synset.file == LEXICOGRAPHER_FILES[file]
                and synset.offset not in taken
                and not names & set(synset.lemmas)
                and EVERYDAY_NAME.fullmatch(name)
                and not UNSUITABLE.search(synset.gloss + name)
            ):
                text = noun_text(synset, nouns)
                found += [text] if text else []
        texts += sorted(found, key=lambda text: digest(text["id"]))[:count]
    return sorted(texts, key=lambda text: digest(text["id"]))


def noun_text(synset: Synset, nouns: WordNet) -> dict[str, str] | None:
    """A noun's gloss and what it is a kind of; None if the gloss makes no sentence."""
    number = countability(nouns, synset)
    meaning = definition(synset.lemmas[0], number, synset.gloss, num_words=40) if number else ""
    if not number or not meaning:
        return None
    kinds = nouns.kinds(synset)[:MAX_KINDS]
    sentences = [question(synset.lemmas[0], number), meaning, *remarks(number, synset.gloss)[:2]]
    if kinds:
        sentences.append(chain_sentence(synset.lemmas[0], number, kinds))
    synonyms = [lemma for lemma in synset.lemmas[1:] if EVERYDAY_NAME.fullmatch(lemma)]
    if synonyms:
        sentences.append(sentence("it is also called", noun_phrase(synonyms[0], number)))
    return {"id": f"wordnet-{synset.offset:08d}", "text": " ".join(sentences), **NOUN_TEXT}


def write_pairs(path: Path, concepts: list[Concept], font: ImageFont.FreeTypeFont) -> None:
    """A WebDataset tar: picture, caption and description of each concept, in order of the keys."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for concept in sorted(concepts, key=lambda concept: concept.key):
            description = {
                "key": concept.key,
                "name": concept.name,
                "keywords": list(concept.keywords),
                "codepoints": f"{ord(concept.character):X}",
                **PICTURE,
            }
            members = {
                "png": picture(concept.character, font),
                "txt": caption(concept).encode(),
                "json": json.dumps(description, ensure_ascii=False).encode(),
            }
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{concept.key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    write_file(path, buffer.getvalue())


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """The records as JSON, one a line."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_file(path, "".join(lines).encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file or none: to a temporary name beside it, then rename."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sources() -> str:
    """SOURCES.md: the packages with their versions, and their licences in full."""
    text = (HERE / "sources_head.md").read_text()
    for package in (FONT_PACKAGE, ANNOTATIONS_PACKAGE, WORDNET_PACKAGE):
        query = ["dpkg-query", "--show", "--showformat=${Version}", package]
        version = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        notice = Path(f"/usr/share/doc/{package}/copyright")
        require(notice, package)
        body = "\n".join(line.rstrip() for line in notice.read_text().splitlines())
        text += f"\n## {package} {version}: licence as shipped\n\n```text\n{body.strip()}\n```\n"
    return text


if __name__ == "__main__":
    run_command(main)
