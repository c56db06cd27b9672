"""JAM-Uniform is the parents' weighted mean, and what every fusion writes down and refuses."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.fuse import fuse
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import pico_config, pico_folder

CONFIG = pico_config("tower", num_layers=2, bias=True, affine_norm=True)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An LLM and an image model in fp32."""
    root = tmp_path_factory.mktemp("parents")
    return (
        pico_folder(root / "llm", CONFIG, seed=1, dtype=torch.float32),
        pico_folder(root / "image", CONFIG, seed=2, dtype=torch.float32),
    )


def recipe(text: Path, image: Path, output: Path, **settings: object) -> FusionRecipe:
    values = {"method": "uniform", "text": text, "image": image, "output": output, **settings}
    return FusionRecipe(**values)  # type: ignore[arg-type]


def test_mean_of_a_model_and_itself_is_the_model(
    parents: tuple[Path, Path], tmp_path: Path
) -> None:
    text, _ = parents
    fuse(recipe(text, text, tmp_path / "child"))
    parent, child = WeightsFolder(text), WeightsFolder(tmp_path / "child")
    assert child.config == parent.config
    for file in text.glob("*.safetensors"):
        assert (tmp_path / "child" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_text_share_is_the_weight_of_the_llm(
    share: float, parents: tuple[Path, Path], tmp_path: Path
) -> None:
    fuse(recipe(*parents, tmp_path / "child", text_share=share))
    text, image, child = (WeightsFolder(p) for p in (*parents, tmp_path / "child"))
    assert child.names == text.names
    for name in child.names:
        t, i = text.read(name), image.read(name)
        due = (t.double() * share + i.double() * (1 - share)).float()
        assert torch.equal(child.read(name), due), name
        if share in (0.0, 1.0):
            assert torch.equal(child.read(name), i if share == 0 else t), name


def test_child_has_a_dtype_that_holds_both_parents(
    parents: tuple[Path, Path], tmp_path: Path
) -> None:
    low = pico_folder(tmp_path / "low", CONFIG, seed=1, dtype=torch.bfloat16)
    fuse(recipe(low, parents[1], tmp_path / "child"))
    child, text, image = (WeightsFolder(p) for p in (tmp_path / "child", low, parents[1]))
    for name in child.names:
        due = (text.read(name).double() + image.read(name).double()) / 2
        assert torch.equal(child.read(name), due.float()), name


def test_provenance_says_where_every_tensor_is_from(
    parents: tuple[Path, Path], tmp_path: Path
) -> None:
    fuse(recipe(*parents, tmp_path / "child", text_share=0.25))
    child = WeightsFolder(tmp_path / "child")
    told = child.provenance
    assert told["made_by"] == "tools/fuse.py"
    assert told["recipe"]["method"] == "uniform"
    assert told["recipe"]["text_share"] == "0.25"
    assert "output" not in told["recipe"]
    for role, path in zip(("text", "image"), parents, strict=True):
        parent = WeightsFolder(path)
        assert told["parents"][role]["folder"] == str(path)
        recorded = json.dumps(parent.provenance["sha256"], sort_keys=True)
        assert told["parents"][role]["sha256"] == hashlib.sha256(recorded.encode()).hexdigest()
    for name in child.names:
        content = child.read(name).contiguous().view(torch.uint8).numpy().tobytes()
        assert told["sha256"][name] == hashlib.sha256(content).hexdigest()
    for name in ("vocabulary.json", "tokenizer.json"):
        assert (tmp_path / "child" / name).read_bytes() == (parents[0] / name).read_bytes()


def test_pair_is_no_parent(parents: tuple[Path, Path], tmp_path: Path) -> None:
    pair = pico_folder(tmp_path / "pair", pico_config("cross", num_layers=2))
    before = sorted(tmp_path.iterdir())
    for text, image in ((pair, parents[1]), (parents[0], pair)):
        with pytest.raises(UsageError, match="pair has two towers already; a parent has one"):
            fuse(recipe(text, image, tmp_path / "child"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_parent_is_not_overwritten(parents: tuple[Path, Path]) -> None:
    before = (parents[0] / "provenance.json").read_bytes()
    with pytest.raises(UsageError, match=r"llm would replace .*llm, which is read"):
        fuse(recipe(*parents, parents[0].parent / "image" / ".." / "llm"))
    assert (parents[0] / "provenance.json").read_bytes() == before


def test_parent_with_a_missing_tensor_is_refused(
    parents: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = pico_folder(tmp_path / "broken", CONFIG, dtype=torch.float32)
    index = broken / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("head.norm.bias", "head.norm.shift"))
    with pytest.raises(UsageError, match=r"missing \['head.norm.bias'\]"):
        fuse(recipe(parents[0], broken, tmp_path / "child"))
    assert not (tmp_path / "child").exists()
