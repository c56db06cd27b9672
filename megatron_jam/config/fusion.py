"""The recipe of a fusion."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_jam.config.checks import check_types
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_settings
from megatron_jam.config.model import check_layers


@dataclass(frozen=True, kw_only=True)
class FusionRecipe:
    """Which parents become which model (paper section 2.1)."""

    method: Literal["uniform", "width", "cross"]
    """uniform: weights averaged. width: widths concatenated. cross: two towers with bridges."""

    text: Path
    """Weights folder of the LLM."""

    image: Path
    """Weights folder of the text-to-image model."""

    output: Path
    """Weights folder to write."""

    tokenizer: Path | None = None
    """Folder of the child's tokenizer.json and vocabulary.json; none means the image model's. Rows
    go by what tokens are: parents may number them otherwise, or lack some."""

    positions: Literal[
        "equal", "image", "llm", "extend(zeros)", "extend(repeat)", "extend(interpolate)"
    ] = "equal"
    """`equal` refuses parents with unlike numbers of positions. `image`, `llm`: that parent's
    number, and where the child has one table its rows. `extend(...)`: the larger number, with rows
    of zeros, the rows once more, or the rows spread evenly with lines drawn between them."""

    text_share: float = 0.5
    """uniform: weight of the LLM in the average (paper eq. 1: 1/2)."""

    fill: Literal["copy", "average", "diagonal"] = "copy"
    """width: second column of blocks, a copy (paper eq. 2) or the parents' average (eq. 3). With
    `diagonal` the blocks off the diagonal are zero and norms go by halves, so that each half's
    states begin as exactly its parent's."""

    every: int = 2
    """cross: a bridge follows layer l where l % every == 0; 0 means none (paper table 4)."""

    layers: list[int] = field(default_factory=list)
    """cross: layers that a bridge follows, in place of `every`; none means `every`."""

    into: Literal["both", "image", "text"] = "both"
    """cross: which tower the bridges write to."""

    kv_norm: bool = False
    """cross: a norm also on the states that a bridge makes keys and values of."""

    bridges: Literal["random", "zero"] = "random"
    """cross: how bridges begin; `zero` adds nothing at step 0."""

    projection: Literal["random", "half"] = "random"
    """cross: how the [image ; text] projection begins; `half` is the mean of both towers."""

    tables: Literal["shared", "per_tower"] = "shared"
    """cross: one token table and one position table for both towers, or each parent's own."""

    head: Literal["project", "wide"] = "project"
    """cross: a projection of both towers for all output rows, or each tower's norm for its rows.
    With `tables: per_tower`, `head: wide` and `bridges: zero` the child begins with exactly its
    parents' logits."""

    alignment: list[int] = field(default_factory=list)
    """cross: which layer of the deeper parent each layer of the shallower one stands beside; none
    spreads them evenly."""

    seed: int = 0
    """Of what no parent has: rows of tokens; in a cross, the bridges and the projection."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.text_share <= 1:
            raise UsageError(f"text_share is {self.text_share}; it must lie in 0..1")
        if self.every < 0:
            raise UsageError(f"every is {self.every}; it must be 0 (no bridges) or more")
        check_layers(self.layers, "layers")
        check_layers(self.alignment, "alignment")

    @classmethod
    def load(cls, path: Path) -> "FusionRecipe":
        """Read a recipe from YAML; an unknown or missing key is a UsageError."""
        values = read_settings(path)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"{path}: unknown key `{name}`; known: {known}")
        for name in ("method", "text", "image", "output"):
            if name not in values:
                raise UsageError(f"{path}: `{name}` is missing")
        for name in ("text", "image", "output", "tokenizer"):
            if values.get(name) is None and name == "tokenizer":
                continue
            if not isinstance(values[name], str):
                raise UsageError(f"{path}: `{name}` is {values[name]!r}; it must be a folder")
            values[name] = Path(values[name])
        recipe = cls(**values)
        _check_all_matter(path, recipe, values)
        return recipe


_OF_BRIDGES = ("into", "kv_norm", "bridges")
_OPTIONS = {
    "uniform": ("text_share",),
    "width": ("fill",),
    "cross": ("every", "layers", *_OF_BRIDGES, "projection", "tables", "head", "alignment"),
}
"""What one method alone reads."""


def _check_all_matter(path: Path, recipe: FusionRecipe, values: Mapping[str, Any]) -> None:
    """Raise UsageError where a recipe names what its method does not read."""
    for method, options in _OPTIONS.items():
        for name in options:
            if name in values and method != recipe.method:
                raise UsageError(
                    f"{path}: `{name}` is of method {method}, and this is {recipe.method}: leave it"
                    " out, or take that method"
                )
    if "every" in values and recipe.layers:
        raise UsageError(f"{path}: `every` and `layers` both say where bridges are: leave one out")
    for name in _OF_BRIDGES:
        if name in values and not recipe.every:
            raise UsageError(
                f"{path}: `{name}` is of bridges, and `every: 0` has none: leave it out"
            )
