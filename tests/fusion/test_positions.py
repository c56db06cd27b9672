"""Parents with unlike numbers of positions."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.fuse import Fusion, fuse
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import LLAMA, SEPARATE, pico_config, pico_folder

TABLE = "embedding.positions.weight"
SHORT, LONG = 24, 64


def model(positions: int, **settings: object):
    config = pico_config("tower", num_layers=1)
    return dataclasses.replace(config, max_positions=positions, **settings)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("positions")
    return {
        "text": pico_folder(root / "llm", model(SHORT), seed=1),
        "image": pico_folder(root / "image", model(LONG), seed=2),
    }


def child(parents: dict[str, Path], output: Path, **settings: object) -> WeightsFolder:
    fuse(FusionRecipe(output=output, **parents, **settings))  # type: ignore[arg-type]
    return WeightsFolder(output)


def grown(rows: Tensor, how: str) -> Tensor:
    """The rule for a single row, said plainly."""
    result = []
    for place in range(LONG):
        if how == "zeros":
            result.append(rows[place] if place < SHORT else torch.zeros_like(rows[0]))
        elif how == "repeat":
            result.append(rows[place % SHORT])
        else:
            x = place * (SHORT - 1) / (LONG - 1)
            low = min(int(x), SHORT - 2)
            result.append(rows[low] * (low + 1 - x) + rows[low + 1] * (x - low))
    return torch.stack(result)


@pytest.mark.parametrize("how", ["zeros", "repeat", "interpolate"])
@pytest.mark.parametrize("method", ["uniform", "width", "per_tower"])
def test_the_shorter_table_grows(
    method: str, how: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    text, image = (WeightsFolder(parents[name]).read(TABLE) for name in ("text", "image"))
    due = torch.cat([text[:2], grown(text[2:], how)])
    settings = {"method": method, "positions": f"extend({how})"}
    if method == "per_tower":
        settings = {**settings, "method": "cross", **SEPARATE}
    made = child(parents, tmp_path / "child", **settings)
    assert made.config.max_positions == LONG
    if method == "uniform":
        torch.testing.assert_close(made.read(TABLE), (due + image) / 2, rtol=0, atol=1e-15)
        return
    name = TABLE if method == "width" else "embedding.text.positions.weight"
    found = made.read(name)[:, :32]
    torch.testing.assert_close(found, due, rtol=0, atol=1e-15)
    assert torch.equal(found[:2], text[:2])
    if how != "interpolate":
        assert torch.equal(found, due)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["uniform", "width"])
def test_rows_between_others_are_rounded_to_the_parents_dtype(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """And then averaged; the certificate, which each fusion ends with, knows that."""
    paths = {
        name: pico_folder(tmp_path / name, model(count), seed=count, dtype=dtype)
        for name, count in (("text", SHORT + 9), ("image", LONG))
    }
    made = child(paths, tmp_path / "child", method=method, positions="extend(interpolate)")
    assert made.provenance["certificate"]["largest_error_in_ulp"] < 0.501


@pytest.mark.parametrize("method", ["uniform", "cross"])
@pytest.mark.parametrize(("named", "count"), [("image", LONG), ("llm", SHORT)])
def test_one_parents_table(
    method: str, named: str, count: int, parents: dict[str, Path], tmp_path: Path
) -> None:
    made = child(parents, tmp_path / "child", method=method, positions=named)
    assert made.config.max_positions == count
    parent = parents["text" if named == "llm" else named]
    assert torch.equal(made.read(TABLE), WeightsFolder(parent).read(TABLE))


def test_a_longer_table_is_cut(parents: dict[str, Path], tmp_path: Path) -> None:
    made = child(parents, tmp_path / "child", method="width", positions="llm")
    image = WeightsFolder(parents["image"]).read(TABLE)
    assert torch.equal(made.read(TABLE)[:, 32:], image[: SHORT + 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "cross"}, "the LLM has 24 positions, the image model 64: say `positions: `"),
        ({"method": "uniform"}, "the LLM has 24 positions, the image model 64"),
        ({"method": "width", "positions": "image"}, "24 positions, the child 64, .* are kept: say"),
        ({"method": "cross", "positions": "longer"}, "positions is 'longer'"),
    ],
)
def test_nothing_is_guessed(
    settings: dict, message: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        Fusion.plan(FusionRecipe(output=tmp_path / "child", **parents, **settings))
    with pytest.raises(UsageError, match=message):
        child(parents, tmp_path / "child", **settings)
    assert list(tmp_path.iterdir()) == []


def test_rotated_towers_have_no_rows_to_grow(tmp_path: Path) -> None:
    llama = pico_config("tower", num_layers=1, **LLAMA)
    paths = {
        "text": pico_folder(tmp_path / "llm", dataclasses.replace(llama, max_positions=SHORT)),
        "image": pico_folder(tmp_path / "image", llama, seed=2),
    }
    made = child(paths, tmp_path / "child", method="uniform", positions="llm")
    assert made.config.max_positions == SHORT


def test_unused_rows_in_front_follow_the_image_model(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    """An LLM without OPT's two rows: its row of position 0 is still that of position 0."""
    config = model(LONG, position_offset=0)
    text = pico_folder(tmp_path / "llm", config, seed=3)
    made = child({**parents, "text": text}, tmp_path / "child", method="cross", **SEPARATE)
    own, found = WeightsFolder(text).read(TABLE), made.read("embedding.text.positions.weight")
    assert torch.equal(found[2:], own)
    assert torch.count_nonzero(found[:2]) == 0
