"""The configurations that ship for the paper's models: each is read, and counts what it should."""

from pathlib import Path

import pytest

from megatron_jam.config.files import read_settings
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import POSITIONS, num_parameters, parameter_table

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PAPER_COUNTS = {
    "tower": 6_729_801_728,
    "width": 26_344_505_344,
    "cross_none": 13_205_807_104,
    "cross_every1": 26_090_708_992,
    "cross_every2": 19_648_258_048,
    "cross_every4": 16_427_032_576,
}
"""Parameters of the paper's parent, JAM-Width, and JAM-Cross by bridges (table 4)."""


def test_every_file_is_known() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == PAPER_COUNTS.keys()


@pytest.mark.parametrize("name", PAPER_COUNTS)
def test_exact_count(name: str) -> None:
    model = ModelConfig.from_dict(read_settings(CONFIGS / f"{name}.yaml"))
    assert num_parameters(model) == PAPER_COUNTS[name]
    shapes = {entry.name: entry.shape for entry in parameter_table(model)}
    assert shapes[POSITIONS][0] == 4_098
    assert model.vocab_size == 66_056


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("uniform", "uniform", {"text_share": 0.5}),
        ("width_copy", "width", {"fill": "copy"}),
        ("width_average", "width", {"fill": "average"}),
        ("width_diagonal", "width", {"fill": "diagonal"}),
        ("cross_none", "cross", {"every": 0}),
        ("cross_every1", "cross", {"every": 1}),
        ("cross_every2", "cross", {"every": 2}),
        ("cross_every4", "cross", {"every": 4}),
    ],
)
def test_recipes_of_the_paper(name: str, method: str, settings: dict) -> None:
    recipe = FusionRecipe.load(RECIPES / f"{name}.yaml")
    assert (recipe.method, recipe.output.name) == (method, name)
    assert {key: getattr(recipe, key) for key in settings} == settings
    assert (recipe.bridges, recipe.projection, recipe.tables) == ("random", "random", "shared")


def test_every_recipe_is_known() -> None:
    assert len(list(RECIPES.iterdir())) == 8
