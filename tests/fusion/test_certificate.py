"""A fusion's certificate: it holds for what the methods make, and finds what they did not."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.fusion import certificate
from megatron_jam.fusion import fuse as fusing
from megatron_jam.fusion.blocks import Blocks, held
from megatron_jam.fusion.fuse import fuse
from megatron_jam.models.parameters import Parameter
from megatron_jam.weights.folder import FolderWriter, WeightsFolder
from megatron_jam.weights.reference import reference_logits
from megatron_jam.weights.stream import tensor_sha256
from tests.helpers.pico import SEPARATE, changed_folder, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import whole_logits

RECIPES: list[dict[str, Any]] = [
    {"method": "uniform"},
    {"method": "uniform", "text_share": 0.3},
    {"method": "width", "fill": "copy"},
    {"method": "width", "fill": "average"},
    {"method": "width", "fill": "diagonal"},
    {"method": "cross"},
    {"method": "cross", "kv_norm": True, "every": 1, **SEPARATE},
]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def parents(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parents")
    config = pico_config("tower", num_layers=2, bias=True, affine_norm=True)
    return {
        name: pico_folder(root / name, config, seed=seed, dtype=request.param)
        for seed, name in enumerate(("text", "image"))
    }


@pytest.mark.parametrize("settings", RECIPES, ids=lambda each: " ".join(map(str, each.values())))
def test_every_method_is_what_its_recipe_says(
    settings: dict, parents: dict[str, Path], tmp_path: Path
) -> None:
    """To half a unit in the last place: each element is rounded once."""
    fuse(FusionRecipe(output=tmp_path / "child", **parents, **settings))
    certificate = WeightsFolder(tmp_path / "child").provenance["certificate"]
    error = certificate["largest_error_in_ulp"]
    if settings.get("fill") in ("copy", "diagonal"):
        assert error == 0
    elif settings["method"] != "cross":
        assert 0.4 < error < 0.501
    else:
        assert error < 0.501
    assert certificate["models_and_reference"] == "not compared"


@pytest.mark.parametrize("settings", RECIPES, ids=lambda each: " ".join(map(str, each.values())))
def test_one_wrong_element_is_found(
    settings: dict, parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit in the last place of one element of the last layer's last matrix."""
    method = settings["method"]
    configure, compute = fusing.METHODS[method]

    def wrong(entry: Parameter, given: Any) -> Blocks:
        blocks = compute(entry, given)
        if "layers.1" not in entry.name or "fc2.weight" not in entry.name:
            return blocks
        whole = blocks.rows(0, blocks.shape[0]).clone()
        whole[-1, -1] = torch.nextafter(whole[-1, -1].float(), torch.tensor(9.0)).to(whole.dtype)
        if whole.dtype == torch.bfloat16:
            whole[-1, -1] *= 1 + 2**-7
        return held(whole)

    monkeypatch.setitem(fusing.METHODS, method, (configure, wrong))
    with pytest.raises(UsageError, match=r"layers\.1\..*fc2\.weight of the child is .* units"):
        fuse(FusionRecipe(output=tmp_path / "child", **parents, **settings))
    assert list(tmp_path.iterdir()) == []


def test_models_and_reference_are_held_together(
    parents: dict[str, Path], tmp_path: Path, pool: WorkerPool
) -> None:
    def by_models(path: Path, ids: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(ids)
        return pool.run(whole_logits, ParallelConfig(), path, tokens, torch.float32)[0].numpy()

    recipe = FusionRecipe(method="cross", output=tmp_path / "child", **parents)
    fuse(recipe, model_logits=by_models)
    certificate = WeightsFolder(tmp_path / "child").provenance["certificate"]
    assert 0 < certificate["models_and_reference"] < 1e-5
    with pytest.raises(UsageError, match="models/ and the plain reference differ by"):
        fuse(recipe, model_logits=lambda path, ids: by_models(path, ids) * 1.001)
    fuse(recipe, model_logits=lambda path, ids: "too large")
    certificate = WeightsFolder(tmp_path / "child").provenance["certificate"]
    assert certificate["models_and_reference"] == "not compared: too large"


def test_distance_is_that_of_the_logits(parents: dict[str, Path], tmp_path: Path) -> None:
    fuse(FusionRecipe(method="uniform", output=tmp_path / "child", **parents))
    child = WeightsFolder(tmp_path / "child")
    certificate = child.provenance["certificate"]
    places = np.arange(64) * 7_368_787 % child.config.vocab_size
    prompts = torch.from_numpy(places.reshape(2, 32))

    def logits(folder: WeightsFolder) -> Tensor:
        return reference_logits(folder.config, lambda name: folder.read(name).float(), prompts)

    mine = logits(child)
    for name, path in parents.items():
        its = logits(WeightsFolder(path))
        told = certificate[f"distance_to_{name}"]
        assert told["largest_difference"] == float((its - mine).abs().max())
        kl = torch.nn.functional.kl_div(
            mine.log_softmax(-1).flatten(0, 1),
            its.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        assert told["kl_divergence"] == pytest.approx(float(kl), rel=1e-5)
        assert told["same_likeliest"] == float((its.argmax(-1) == mine.argmax(-1)).float().mean())


def test_a_parent_that_changes_meanwhile_is_found(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touched while the child is written: another program may be half-way through it."""
    recipe = FusionRecipe(method="uniform", output=tmp_path / "child", **parents)
    (file,) = parents["image"].glob("*.safetensors")
    configure, compute = fusing.METHODS["uniform"]

    def touching(entry: Parameter, given: Any) -> Blocks:
        if entry.name == "layers.1.main.ffn.fc2.weight":
            file.touch()
        return compute(entry, given)

    monkeypatch.setitem(fusing.METHODS, "uniform", (configure, touching))
    with pytest.raises(UsageError, match=f"{file.name} was changed while it was read"):
        fuse(recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.3, 1 / 3])
def test_terms_that_nearly_cancel_are_sums_in_fp32(
    share: float, parents: dict[str, Path], tmp_path: Path
) -> None:
    """Their sum is as small as what the products lost; a difference beyond that is found."""
    image = changed_folder(
        tmp_path / "image", parents["text"], lambda _, each: each * (-share / (1 - share))
    )
    recipe = FusionRecipe(
        method="uniform",
        text=parents["text"],
        image=image,
        output=tmp_path / "child",
        text_share=share,
    )
    fuse(recipe)
    assert WeightsFolder(recipe.output).provenance["certificate"]["largest_error_in_ulp"] < 0.51


@pytest.mark.parametrize("size", [1e-30, 1.5e-3])
def test_what_must_be_zero_is_zero(
    size: float, parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure, compute = fusing.METHODS["width"]

    def wrong(entry: Parameter, given: Any) -> Blocks:
        blocks = compute(entry, given)
        if "layers.1" not in entry.name or "fc2.weight" not in entry.name:
            return blocks
        whole = blocks.rows(0, blocks.shape[0]).clone()
        assert whole[0, -1] == 0
        whole[0, -1] = size
        return held(whole)

    monkeypatch.setitem(fusing.METHODS, "width", (configure, wrong))
    recipe = FusionRecipe(method="width", fill="diagonal", output=tmp_path / "child", **parents)
    with pytest.raises(UsageError, match=r"layers\.1\..*fc2\.weight of the child is .* units"):
        fuse(recipe)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_the_parents_fault(
    value: float, parents: dict[str, Path], tmp_path: Path
) -> None:
    def spoilt(_: str, each: Tensor) -> Tensor:
        each.view(-1)[0] = value
        return each

    image = changed_folder(tmp_path / "image", parents["image"], spoilt)
    given = {"text": parents["text"], "image": image, "output": tmp_path / "child"}
    with pytest.raises(UsageError, match=r"is made of is not finite in one of .*image, .*text"):
        fuse(FusionRecipe(method="uniform", **given))
    fuse(FusionRecipe(method="uniform", text_share=1, **given))  # which takes nothing of it
    of_text, of_child = (
        WeightsFolder(p).provenance["sha256"] for p in (parents["text"], tmp_path / "child")
    )
    assert of_child == of_text


def flipped(path: Path, output: Path, name: str) -> Path:
    """A copy of a weights folder with one bit of one tensor changed, and no hash."""
    shutil.copytree(path, output)
    stored = WeightsFolder(output).stored(name)
    content = bytearray(stored.path.read_bytes())
    content[stored.offset] ^= 1
    stored.path.write_bytes(content)
    return output


@pytest.mark.parametrize("name", ["embedding.tokens.weight", "layers.1.main.ffn.fc2.weight"])
@pytest.mark.parametrize("damaged", ["text", "image"])
@pytest.mark.parametrize("settings", RECIPES, ids=lambda each: " ".join(map(str, each.values())))
def test_a_damaged_parent_is_found(
    settings: dict, damaged: str, name: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever the child is made of: averaged, concatenated or copied."""
    folder = flipped(parents[damaged], tmp_path / "damaged", name)
    given = {**parents, damaged: folder, "output": tmp_path / "child"}
    message = f"{re.escape(str(folder))}: {re.escape(name)} is not what was written, by its sha256"
    with pytest.raises(UsageError, match=message):
        fuse(FusionRecipe(**given, **settings))
    assert not (tmp_path / "child").exists()


def test_a_damaged_child_is_not_called_its_parents_fault(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = FolderWriter.complete

    def damaging(writer: FolderWriter, provenance: Any) -> WeightsFolder:
        child = complete(writer, provenance)
        return WeightsFolder(flipped(child.path, tmp_path / "damaged", child.names[0]))

    monkeypatch.setattr(FolderWriter, "complete", damaging)
    with pytest.raises(UsageError, match="of the child has not the sha256 that was recorded"):
        fuse(FusionRecipe(method="cross", output=tmp_path / "child", **parents))
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize("settings", RECIPES, ids=lambda each: " ".join(map(str, each.values())))
def test_no_tensor_is_hashed_twice(
    settings: dict, parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one whose copy was."""
    hashed: list[str] = []

    def noting(tensor: Tensor) -> str:
        hashed.append(tensor_sha256(tensor))
        return hashed[-1]

    monkeypatch.setattr(certificate, "tensor_sha256", noting)
    fuse(FusionRecipe(output=tmp_path / "child", **parents, **settings))
    mine = list(WeightsFolder(tmp_path / "child").hashes.values())
    own = {name: WeightsFolder(path).hashes for name, path in parents.items()}
    if settings["method"] == "cross" and "tables" not in settings:
        del own["text"]["embedding.positions.weight"]  # they are the image model's
    others = {each for hashes in own.values() for each in hashes.values()}
    assert sorted(hashed) == sorted([*mine, *others.difference(mine)])
