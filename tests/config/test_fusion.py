"""Recipes of fusions."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe

RECIPE: dict[str, Any] = {"method": "cross", "text": "llm", "image": "cm3leon", "output": "child"}


def load(folder: Path, **changes: Any) -> FusionRecipe:
    """Write RECIPE with changes (None leaves a key out) and read it."""
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in {**RECIPE, **changes}.items() if v is not None})
    )
    return FusionRecipe.load(path)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert (recipe.text, recipe.image, recipe.output) == (
        Path("llm"),
        Path("cm3leon"),
        Path("child"),
    )
    assert (recipe.text_share, recipe.fill, recipe.every) == (0.5, "copy", 2)
    assert (recipe.bridges, recipe.projection, recipe.seed) == ("random", "random", 0)


def test_settings_are_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, every=4, bridges="zero", projection="half", seed=9)
    assert (recipe.every, recipe.bridges, recipe.projection, recipe.seed) == (4, "zero", "half", 9)
    assert load(tmp_path, method="uniform", text_share=1).text_share == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "cross"}, "recipe.yaml: unknown key `methods`; known: .*'method'"),
        ({"image": None}, "recipe.yaml: `image` is missing"),
        ({"image": 3}, "recipe.yaml: `image` is 3; it must be a folder"),
        ({"method": "stack"}, "method is 'stack'; choose one of uniform, width, cross"),
        ({"fill": "zero"}, "fill is 'zero'; choose one of copy, average"),
        ({"bridges": "none"}, "bridges is 'none'; choose one of random, zero"),
        ({"projection": "mean"}, "projection is 'mean'; choose one of random, half"),
        ({"text_share": 1.5}, r"text_share is 1.5; it must lie in 0\.\.1"),
        ({"text_share": "most"}, "text_share is 'most'; it must be a number"),
        ({"every": -2}, "every is -2"),
        ({"every": "2"}, "every is '2'; it must be a whole number"),
        ({"text_share": 0.5}, "`text_share` is of method uniform, and this is cross: leave it out"),
        ({"method": "uniform", "fill": "copy"}, "`fill` is of method width, and this is uniform"),
        ({"method": "width", "head": "wide"}, "`head` is of method cross, and this is width"),
        ({"every": 2, "layers": [1]}, "`every` and `layers` both say where bridges are"),
        ({"every": 0, "kv_norm": True}, "`kv_norm` is of bridges, and `every: 0` has none"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "recipe.yaml holds no settings"),
        ("- uniform", "recipe.yaml holds no settings"),
        ("method: [cross", "recipe.yaml is no YAML: .*line 1"),
    ],
)
def test_what_is_no_recipe_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        FusionRecipe.load(path)
    assert "\n" not in str(caught.value)


RECIPES = Path(__file__).parents[2] / "examples/recipes"
PAPERS = {
    "uniform": ("uniform", "copy", 2),
    "width_copy": ("width", "copy", 2),
    "width_average": ("width", "average", 2),
    "width_diagonal": ("width", "diagonal", 2),
    "cross_none": ("cross", "copy", 0),
    "cross_every1": ("cross", "copy", 1),
    "cross_every2": ("cross", "copy", 2),
    "cross_every4": ("cross", "copy", 4),
}


def test_recipes_that_ship_are_the_papers() -> None:
    """Tables 2 and 4; the diagonal width is ours."""
    found = {path.stem: FusionRecipe.load(path) for path in RECIPES.iterdir()}
    assert {name: (r.method, r.fill, r.every) for name, r in found.items()} == PAPERS
