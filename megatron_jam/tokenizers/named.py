"""The one id space out of a tokenizer that mixes text, image codes and marks (CM3leon, Chameleon).

There an id is what its name says, in whatever order: IMGIMG, a picture code's digits as letters
(A is 0, J is 9) and Z; `<racm3:break>`, `<eoss>`, and sentinels, which Chameleon calls reserved.
Here each kind has ids of its own in a row, so ids are renumbered, and a model's rows with them.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import TEXT_SPECIALS, IdRange, JointVocabulary

_LETTERS = "ABCDEFGHIJ"
_IMAGE = re.compile(rf"IMGIMG([{_LETTERS}]+)Z")
_BREAKS, _EOSS = ("<racm3:break>", "<break>"), "<eoss>"
_SENTINEL = re.compile(r"<sentinel:(\d+)>")
_RESERVED = re.compile(r"<reserved(\d+)>")
_TURN = "<reserved08706>"
"""Chameleon's end of a turn, which is no sentinel."""


@dataclass(frozen=True, kw_only=True)
class NamedIds:
    """A mixed tokenizer, taken apart."""

    vocabulary: JointVocabulary
    """Which id is what here."""

    text: TextTokenizer
    """The tokenizer of text alone, with the ids of `vocabulary`."""

    ids: list[int]
    """The mixed tokenizer's id of each id here."""


def image_token_name(code: int) -> str:
    """The name of a picture code's token."""
    return f"IMGIMG{''.join(_LETTERS[int(digit)] for digit in str(code))}Z"


def has_image_tokens(path: Path) -> bool:
    """Whether a tokenizer.json names image codes."""
    return any(map(_IMAGE.fullmatch, _ids_by_name(read_json(path))))


def read_named(path: Path) -> NamedIds:
    """Take a mixed tokenizer.json apart.

    Text keeps its order, `<s> <pad> </s> <unk>` included; behind it stand image codes, `<break>`,
    `<eoss>`, sentinels, and whatever has no use here.

    Raises:
        UsageError: a name is missing, or picture codes have gaps.
    """
    content = read_json(path)
    found = _ids_by_name(content)
    codes = {_code(match[1]): found[match[0]] for match in map(_IMAGE.fullmatch, found) if match}
    if sorted(codes) != list(range(len(codes))) or not codes:
        raise UsageError(f"{path}: the names of image codes are not those of codes 0, 1, 2 ...")
    marks = [_one_of(path, found, _BREAKS), _one_of(path, found, (_EOSS,))]
    sentinels = _sentinels(path, found)
    size = max(found.values()) + 1
    used = {*codes.values(), *marks, *sentinels}
    special = {*_specials(content), *filter(_RESERVED.fullmatch, found)} - set(TEXT_SPECIALS)
    rest = used | {found[name] for name in special} | (set(range(size)) - set(found.values()))
    text = [each for each in range(size) if each not in rest]
    image = [codes[code] for code in range(len(codes))]
    order = text + image + marks + sentinels
    order += sorted(set(range(size)) - set(order))
    place = {old: new for new, old in enumerate(order)}
    first = len(text) + len(image)
    bos, pad, eos, unk = (place[_one_of(path, found, (name,))] for name in TEXT_SPECIALS)
    vocabulary = JointVocabulary(
        size=size,
        text=IdRange(0, len(text)),
        image=IdRange(len(text), len(image)),
        sentinels=IdRange(first + 2, len(sentinels)),
        bos=bos,
        pad=pad,
        eos=eos,
        unk=unk,
        break_=first,
        eoss=first + 1,
    )
    return NamedIds(
        vocabulary=vocabulary, text=_text_alone(path, content, place, len(text)), ids=order
    )


def _ids_by_name(content: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json."""
    known = content.get("model", {}).get("vocab", {})
    found = dict(known) if isinstance(known, dict) else {}
    return found | {each["content"]: each["id"] for each in content.get("added_tokens") or ()}


def _specials(content: dict[str, Any]) -> list[str]:
    """Tokens that no text is made of."""
    return [each["content"] for each in content.get("added_tokens") or () if each.get("special")]


def _code(letters: str) -> int:
    return int("".join(str(_LETTERS.index(letter)) for letter in letters))


def _one_of(path: Path, found: dict[str, int], names: tuple[str, ...]) -> int:
    for name in names:
        if name in found:
            return found[name]
    raise UsageError(f"{path} has no {names[0]}")


def _sentinels(path: Path, found: dict[str, int]) -> list[int]:
    for form in (_SENTINEL, _RESERVED):
        matches = [match for match in map(form.fullmatch, found) if match and match[0] != _TURN]
        if matches:
            return [found[match[0]] for match in sorted(matches, key=lambda m: int(m[1]))]
    raise UsageError(f"{path} has no <sentinel:0>, and no <reserved...> that could be one")


def _text_alone(
    path: Path, content: dict[str, Any], place: dict[int, int], size: int
) -> TextTokenizer:
    """The tokenizer without all that is no text, and with its ids here."""
    added = [
        {**each, "id": place[each["id"]]}
        for each in content.get("added_tokens") or ()
        if place[each["id"]] < size
    ]
    known = {
        name: place[old] for name, old in content["model"]["vocab"].items() if place[old] < size
    }
    # Documents are laid out here: no post-processor adds marks.
    alone = {
        **content,
        "model": {**content["model"], "vocab": known},
        "added_tokens": sorted(added, key=lambda each: each["id"]),
        "post_processor": None,
    }
    return TextTokenizer.parse(json.dumps(alone), path)
