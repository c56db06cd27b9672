"""Fused and taken apart again: the parents, bit for bit, as far as the fusion kept them apart."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig, TowerConfig
from megatron_jam.fusion.fuse import Fusion, fuse
from megatron_jam.fusion.unfuse import unfuse
from megatron_jam.weights.folder import PROVENANCE, WeightsFolder
from tests.helpers.commands import fails, tool
from tests.helpers.pico import (
    LLAMA,
    SEPARATE,
    changed_folder,
    pico_config,
    pico_folder,
    pico_vocabulary,
)

OPT = pico_config("tower", bias=True, affine_norm=True)
UNTIED = dataclasses.replace(pico_config("tower", **LLAMA, qk_norm=True), tied=False)
NARROW = pico_config("tower", num_layers=3, hidden_size=24, bias=True, affine_norm=True)
PLAIN = pico_config("tower")
PLAIN_NARROW = pico_config("tower", num_layers=3, hidden_size=24)


def parents(root: Path, text: ModelConfig, image: ModelConfig) -> dict[str, Path]:
    configs = {"text": text, "image": image}
    return {
        name: pico_folder(root / name, config, seed=seed, dtype=torch.bfloat16)
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.mark.parametrize(
    ("method", "settings", "text", "image"),
    [
        ("cross", SEPARATE, OPT, OPT),
        ("cross", SEPARATE, UNTIED, UNTIED),
        ("cross", SEPARATE, OPT, NARROW),
        ("width", {"fill": "copy"}, OPT, OPT),
        ("width", {"fill": "average"}, UNTIED, UNTIED),
        ("width", {"fill": "diagonal"}, OPT, OPT),
    ],
)
def test_what_was_kept_apart_comes_back(
    method: Any, settings: dict[str, Any], text: ModelConfig, image: ModelConfig, tmp_path: Path
) -> None:
    paths = parents(tmp_path, text, image)
    fuse(FusionRecipe(method=method, output=tmp_path / "child", **paths, **settings))
    for name, path in paths.items():
        unfuse(tmp_path / "child", name, tmp_path / "back")
        due, found = WeightsFolder(path), WeightsFolder(tmp_path / "back")
        assert found.names == due.names
        assert settled(found) == settled(due)
        for each in due.names:
            assert torch.equal(found.read(each), due.read(each)), each
        assert found.provenance["tower"] == name
        assert found.provenance["certificate"] == {"is_the_parent": True}


def settled(folder: WeightsFolder) -> TowerConfig:
    """The tower with the sizes that were left to their defaults."""
    tower = folder.config.towers["main"]
    return dataclasses.replace(tower, ffn_size=tower.inner_size, num_kv_heads=tower.kv_heads)


def test_a_shared_table_comes_back_as_the_child_has_it(tmp_path: Path) -> None:
    paths = parents(tmp_path, PLAIN, PLAIN_NARROW)
    fuse(FusionRecipe(method="cross", output=tmp_path / "child", **paths))
    span = pico_vocabulary().text
    rows = slice(span.start, span.stop)
    for name, path in paths.items():
        unfuse(tmp_path / "child", name, tmp_path / name / "back")
        due, found = WeightsFolder(path), WeightsFolder(tmp_path / name / "back")
        for each in due.names:
            if each.startswith("layers."):
                assert torch.equal(found.read(each), due.read(each)), each
        table = found.read("embedding.tokens.weight")
        known = due.read("embedding.tokens.weight")
        assert torch.equal(table[rows], known[rows]) == (name == "text")
        assert torch.equal(table[span.stop :], known[span.stop :]) == (name == "image")
        assert found.provenance["certificate"] == {"is_the_parent": False}


def test_a_parent_in_another_dtype_is_not_called_the_same(tmp_path: Path) -> None:
    paths = parents(tmp_path, OPT, OPT)
    paths["image"] = pico_folder(tmp_path / "exact", OPT, seed=1, dtype=torch.float32)
    fuse(FusionRecipe(method="cross", output=tmp_path / "child", **paths, **SEPARATE))
    for name, is_parent in (("text", False), ("image", True)):
        unfuse(tmp_path / "child", name, tmp_path / name / "back")
        due, found = WeightsFolder(paths[name]), WeightsFolder(tmp_path / name / "back")
        for each in due.names:
            assert torch.equal(found.read(each), due.read(each).float()), each
        assert found.provenance["certificate"] == {"is_the_parent": is_parent}


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("project", "embedding.image.projection.weight"),
        ("wide", "embedding.image.projection.weight"),
        ("wide", "head.image.projection.weight"),
    ],
)
def test_a_trained_projection_of_the_shared_table_is_told(
    head: Any, name: str, tmp_path: Path
) -> None:
    """The table's first columns are then no longer what the narrower tower reads."""
    paths = parents(tmp_path, PLAIN, PLAIN_NARROW)
    fuse(FusionRecipe(method="cross", output=tmp_path / "child", head=head, **paths))
    unfuse(tmp_path / "child", "image", tmp_path / "back")

    def train(each: str, tensor: Tensor) -> Tensor:
        if each == name:
            tensor[-1, -1] += 1e-3
        return tensor

    trained = changed_folder(tmp_path / "trained", tmp_path / "child", train)
    message = rf"tower image reads the shared table through {name}, .* `tables: per_tower`"
    with pytest.raises(UsageError, match=message):
        unfuse(trained, "image", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    unfuse(trained, "text", tmp_path / "text of trained")


@pytest.mark.parametrize("tables", ["shared", "per_tower"])
def test_a_trained_projection_of_both_towers_is_no_hindrance(tables: Any, tmp_path: Path) -> None:
    """It is random from the start, and no parent's."""
    paths = parents(tmp_path, PLAIN, PLAIN_NARROW)
    fuse(FusionRecipe(method="cross", output=tmp_path / "child", tables=tables, **paths))
    unfuse(tmp_path / "child", "image", tmp_path / "back")
    back = WeightsFolder(tmp_path / "back")
    assert torch.equal(
        back.read("layers.2.main.ffn.fc2.weight"),
        WeightsFolder(paths["image"]).read("layers.2.main.ffn.fc2.weight"),
    )


@pytest.mark.parametrize(
    ("text", "image", "tower", "dropped"),
    [
        ({"affine_norm": True}, {}, "text", ["weight", "bias"]),
        ({}, {"affine_norm": True}, "text", []),
        ({"affine_norm": True}, {"affine_norm": True, "norm": "rms"}, "text", ["bias"]),
        (
            {"affine_norm": True, "hidden_size": 24},
            {"affine_norm": True},
            "text",
            ["weight", "bias"],
        ),
    ],
    ids=str,
)
def test_a_last_norm_that_fusion_dropped_is_told(
    text: dict, image: dict, tower: str, dropped: list[str], tmp_path: Path
) -> None:
    paths = parents(tmp_path, pico_config("tower", **text), pico_config("tower", **image))
    recipe = FusionRecipe(method="cross", output=tmp_path / "child", **paths)
    plan = [line for line in Fusion.plan(recipe).as_lines() if line.startswith("head.norm.")]
    told = [f"head.norm.{kind} of the LLM is dropped: both towers share a head" for kind in dropped]
    assert [line.split(",")[0] for line in plan] == told
    fuse(recipe)
    unfuse(tmp_path / "child", "image", tmp_path / "image of child")
    if not dropped:
        unfuse(tmp_path / "child", tower, tmp_path / "back")
        return
    message = rf"no head\.norm\.{dropped[0]} of the LLM to give back: .* dropped that norm; fuse"
    with pytest.raises(UsageError, match=message):
        unfuse(tmp_path / "child", tower, tmp_path / "back")
    wide = dataclasses.replace(recipe, head="wide", output=tmp_path / "wide")
    assert not any("is dropped" in line for line in Fusion.plan(wide).as_lines())
    fuse(wide)
    unfuse(tmp_path / "wide", tower, tmp_path / "back")


@pytest.mark.parametrize(
    ("method", "tower"), [("cross", "text"), ("cross", "image"), ("width", "text")]
)
def test_a_damaged_child_is_found(method: Any, tower: str, tmp_path: Path) -> None:
    """Else its parent would have fresh hashes of what nobody wrote."""
    fuse(FusionRecipe(method=method, output=tmp_path / "child", **parents(tmp_path, OPT, OPT)))
    name = f"layers.3.{'main' if method == 'width' else tower}.ffn.fc1.weight"
    stored = WeightsFolder(tmp_path / "child").stored(name)
    content = bytearray(stored.path.read_bytes())
    content[stored.offset] ^= 1
    stored.path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"child: {name} is not what was written, by its sha256"):
        unfuse(tmp_path / "child", tower, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("cross", {"parents": "x"}, r"parents is 'x', no object"),
        ("cross", {"parents": {"text": "x"}}, r"text is 'x', no object"),
        ("width", {"parents": []}, r"parents is \[\], no object"),
        ("width", {"recipe": ["width"]}, r"recipe is \['width'\], no object"),
        ("width", {"recipe": {}}, r"neither a JAM-Cross nor a JAM-Width"),
        ("width", {"recipe": {"method": "width"}}, r"fill of the recipe is None, not copy"),
        ("width", {"recipe": {"method": "width", "fill": []}}, r"fill of the recipe is \[\]"),
    ],
    ids=str,
)
def test_a_provenance_of_another_kind_is_told(
    method: Any, change: dict, message: str, tmp_path: Path
) -> None:
    fuse(FusionRecipe(method=method, output=tmp_path / "child", **parents(tmp_path, OPT, OPT)))
    file = tmp_path / "child" / PROVENANCE
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        unfuse(tmp_path / "child", "text", tmp_path / "back")


def test_a_forged_width_is_told(tmp_path: Path) -> None:
    """A model of one tower that says that it is a width, but cannot be."""
    odd = pico_folder(tmp_path / "odd", pico_config("tower", num_heads=1, num_kv_heads=1))
    file = odd / PROVENANCE
    recipe = {"recipe": {"method": "width", "fill": "copy"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **recipe}))
    with pytest.raises(UsageError, match=r"recipe says width, but num_heads is 1, no two halves"):
        unfuse(odd, "text", tmp_path / "back")


def test_the_command_and_its_mistakes(tmp_path: Path) -> None:
    paths = parents(tmp_path, OPT, OPT)
    fuse(FusionRecipe(method="cross", output=tmp_path / "child", **paths))
    done = tool("unfuse", "child", "text", "back", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert WeightsFolder(tmp_path / "back").config.towers == OPT.towers
    assert "certificate: not bit for bit the parent that was fused: " in done.stderr
    made = pico_folder(tmp_path / "made", pico_config("separate"))
    unfuse(made, "text", tmp_path / "of made")
    certificate = WeightsFolder(tmp_path / "of made").provenance["certificate"]
    assert certificate == {"is_the_parent": None}
    fails(tool("unfuse", "text", "text", "x", cwd=tmp_path), "text is neither a JAM-Cross nor")
    fails(tool("unfuse", "child", "main", "x", cwd=tmp_path), "main.*")
    fails(
        tool("unfuse", "child", "text", "child", cwd=tmp_path),
        "child would replace child, which is read",
    )
