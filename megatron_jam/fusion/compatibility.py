"""In what two parents differ, what each method can do about it, and whether a recipe may go on."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_not_read
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import MAIN, TowerConfig
from megatron_jam.fusion.vocabulary import kind_of, tokens_of
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.weights.folder import WeightsFolder, check_output
from megatron_jam.weights.load import check_tensors

_OF_A_TOWER = "uniform and width refuse; cross keeps each tower's own"
_OF_A_NORM = f"{_OF_A_TOWER}, but one last norm where both share a head"
_WITH_POSITIONS = "uniform and width refuse; cross takes them with `tables: per_tower`"
_EFFECTIVE = {"num_kv_heads": "kv_heads", "ffn_size": "inner_size"}
"""Settings whose 0 stands for another number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing in which the parents differ."""

    what: str
    """The setting."""

    text: Any
    """The LLM's."""

    image: Any
    """The image model's."""

    remedy: str
    """What the methods can do."""

    is_shape: bool = False
    """Whether methods that mix weights cannot go on."""

    def __str__(self) -> str:
        return f"{self.what}: LLM {self.text}, image model {self.image} ({self.remedy})"


def differences(text: WeightsFolder, image: WeightsFolder) -> list[Difference]:
    """Everything in which two parents differ that matters to a fusion."""
    found = []
    for field in dataclasses.fields(TowerConfig):
        name = _EFFECTIVE.get(field.name, field.name)
        values = [getattr(folder.config.towers[MAIN], name) for folder in (text, image)]
        if values[0] != values[1]:
            remedy = _WITH_POSITIONS if name == "positions" else _OF_A_TOWER
            remedy = _OF_A_NORM if name.startswith("norm") or name == "affine_norm" else remedy
            found.append(_difference(field.name, values, remedy, is_shape=True))
    for name, remedy, is_shape in (
        ("tied", "uniform and width refuse; in a cross the head then has rows of its own", True),
        ("position_offset", "the child has the image model's; unused rows move or go", False),
        ("max_positions", "the recipe's `positions` says whose, or how rows are added", False),
    ):
        values = [getattr(folder.config, name) for folder in (text, image)]
        if values[0] != values[1]:
            found.append(_difference(name, values, remedy, is_shape=is_shape))
    if text.dtype != image.dtype:
        values = [str(folder.dtype).removeprefix("torch.") for folder in (text, image)]
        found.append(_difference("dtype", values, "the child has one that holds both"))
    return found + _of_vocabularies(text, image)


def _difference(what: str, values: list, remedy: str, *, is_shape: bool = False) -> Difference:
    return Difference(what=what, text=values[0], image=values[1], remedy=remedy, is_shape=is_shape)


def _of_vocabularies(text: WeightsFolder, image: WeightsFolder) -> list[Difference]:
    tokenizers = [TextTokenizer.load(folder.tokenizer_path) for folder in (text, image)]
    same_text = tokenizers[0].sha256 == tokenizers[1].sha256
    if same_text and text.vocabulary == image.vocabulary:
        return []
    known = [
        set(tokens_of(folder.vocabulary, tokenizer))
        for folder, tokenizer in zip((text, image), tokenizers, strict=True)
    ]
    values = [f"{folder.vocabulary.size:,} ids" for folder in (text, image)]
    shared = sum(kind_of(token) != "unnamed" for token in known[0] & known[1])
    remedy = f"{shared:,} tokens in common; rows go by token"
    if not same_text:
        remedy += "; texts are cut by the child's tokenizer, not as the other parent knew them"
    return [_difference("vocabulary", values, remedy)]


def _check_output(path: Path) -> None:
    """Raise UsageError, before any work and for a mere plan too, if no folder can stand there."""
    check_output(path)
    for above in path.parents:
        if above.exists() and not above.is_dir():
            raise UsageError(f"output {path} lies in {above}, which is a file: name another folder")


def check_parents(
    text: WeightsFolder, image: WeightsFolder, recipe: FusionRecipe
) -> list[Difference]:
    """What differs, if the recipe's method can go on with it.

    Raises:
        UsageError: it cannot; the message names what differs and what to do.
    """
    check_not_read(recipe.output, text.path, image.path, recipe.tokenizer or image.path)
    _check_output(recipe.output)
    for folder in (text, image):
        if folder.config.is_pair:
            raise UsageError(f"{folder.path} has two towers already; a parent has one")
        check_tensors(folder)
    found = differences(text, image)
    in_the_way = [f"{d.what} ({d.text}, {d.image})" for d in found if d.is_shape]
    if recipe.method != "cross" and in_the_way:
        raise UsageError(
            f"method {recipe.method} needs parents of one shape; {text.path} and {image.path}"
            f" differ in {', '.join(in_the_way)}: take method cross, or other parents"
        )
    if recipe.tokenizer is None and not image.vocabulary.has_pictures:
        raise UsageError(
            f"{image.path} has no picture codes in its vocabulary; are text and image swapped?"
        )
    return found
