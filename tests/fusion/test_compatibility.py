"""What is said of parents that differ, and which methods go on with them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.compatibility import differences
from megatron_jam.fusion.fuse import Fusion, fuse
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import LLAMA, SEPARATE, pico_config, pico_folder

OPT: dict[str, Any] = {"num_layers": 2, "bias": True, "affine_norm": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_folder(tmp_path_factory.mktemp("llm") / "llm", pico_config("tower", **OPT))


def other(path: Path, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Path:
    whole = {k: v for k, v in changes.items() if k in ("tied", "position_offset")}
    tower = {k: v for k, v in changes.items() if k not in whole}
    config = dataclasses.replace(pico_config("tower", **{**OPT, **tower}), **whole)
    return pico_folder(path, config, seed=2, dtype=dtype)


@pytest.mark.parametrize("method", ["uniform", "width"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": 3}, r"num_layers \(2, 3\)"),
        ({"ffn_size": 64}, r"ffn_size \(128, 64\)"),
        ({"bias": False}, r"bias \(True, False\)"),
        ({"activation": "gelu"}, r"activation \(relu, gelu\)"),
        ({"qk_norm": True}, r"qk_norm \(False, True\)"),
        ({"norm": "rms"}, r"norm \(layer, rms\)"),
        ({"num_heads": 2, "affine_norm": False}, r"num_heads .*num_kv_heads .*affine_norm"),
        ({"tied": False}, r"tied \(True, False\)"),
    ],
    ids=str,
)
def test_methods_that_mix_weights_want_one_shape(
    method: Any, changes: dict, named: str, llm: Path, tmp_path: Path
) -> None:
    paths = {"text": llm, "image": other(tmp_path / "image", **changes)}
    before = sorted(tmp_path.iterdir())
    message = rf"method {method} needs parents of one shape; .* {named}.*: take method cross"
    with pytest.raises(UsageError, match=message):
        fuse(FusionRecipe(method=method, output=tmp_path / "child", **paths))
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_left_to_a_default_is_no_difference(llm: Path, tmp_path: Path) -> None:
    image = other(tmp_path / "image", ffn_size=128, num_kv_heads=4)
    assert differences(WeightsFolder(llm), WeightsFolder(image)) == []


def test_a_cross_takes_unlike_parents(llm: Path, tmp_path: Path) -> None:
    """An OPT in fp64 beside a Llama in fp32 with a head of its own and other positions."""
    settings = {**LLAMA, "bias": False, "tied": False}
    image = other(tmp_path / "image", dtype=torch.float32, **settings)
    told = [str(each) for each in differences(WeightsFolder(llm), WeightsFolder(image))]
    assert "norm: LLM layer, image model rms (uniform and width refuse; cross keeps" in " ".join(
        told
    )
    named = [each.split(":")[0] for each in told]
    assert named == [
        "num_heads",
        "ffn_size",
        "activation",
        "gated",
        "bias",
        "norm",
        "positions",
        "tied",
        "dtype",
    ]
    paths = {"text": llm, "image": image}
    with pytest.raises(UsageError, match="set tables: per_tower"):
        fuse(FusionRecipe(method="cross", output=tmp_path / "child", **paths))
    recipe = FusionRecipe(
        method="cross", output=tmp_path / "child", bridges="zero", **paths, **SEPARATE
    )
    fuse(recipe)
    child, text = WeightsFolder(tmp_path / "child"), WeightsFolder(llm)
    assert (child.dtype, child.config.tied) == (torch.float64, False)
    assert child.provenance["differences"] == told
    table = text.read("embedding.tokens.weight")
    assert torch.equal(child.read("head.text.output.weight"), table)
    tokens = torch.randint(4, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    due = reference_logits(text.config, text.read, tokens)[..., :300]
    found = reference_logits(child.config, child.read, tokens)[..., :300]
    assert torch.equal(found, due)


def test_an_output_that_cannot_stand_there_is_told_in_the_plan(llm: Path, tmp_path: Path) -> None:
    recipe = FusionRecipe(
        method="uniform", text=llm, image=other(tmp_path / "image"), output=tmp_path / "child"
    )
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not ours")
    for output, message in (
        ("file", "file is a link or a file"),
        ("file/child", "output .*child lies in .*file, which is a file"),
        ("notes", "notes is not replaced, as it has files but no provenance.json"),
    ):
        with pytest.raises(UsageError, match=message):
            Fusion.plan(dataclasses.replace(recipe, output=tmp_path / output))
    Fusion.plan(recipe)
    fuse(recipe)
    Fusion.plan(recipe)  # an older child is replaced


def test_the_plan_does_not_promise_a_shared_heads_norm(llm: Path, tmp_path: Path) -> None:
    image = WeightsFolder(other(tmp_path / "image", norm="rms", norm_epsilon=1e-6))
    told = [str(each) for each in differences(WeightsFolder(llm), image)]
    assert [each.split(":")[0] for each in told] == ["norm", "norm_epsilon"]
    assert all("tower's own, but one last norm where both share a head)" in each for each in told)
