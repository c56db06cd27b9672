"""Fused and taken apart again: the parents, bit for bit, as far as the fusion kept them apart."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig, TowerConfig
from megatron_jam.fusion.fuse import fuse
from megatron_jam.fusion.unfuse import unfuse
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.commands import fails, tool
from tests.helpers.pico import LLAMA, SEPARATE, pico_config, pico_folder, pico_vocabulary

OPT = pico_config("tower", bias=True, affine_norm=True)
UNTIED = dataclasses.replace(pico_config("tower", **LLAMA, qk_norm=True), tied=False)
NARROW = pico_config("tower", num_layers=3, hidden_size=24, bias=True, affine_norm=True)


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
    paths = parents(tmp_path, OPT, NARROW)
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
