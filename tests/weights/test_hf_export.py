"""What is exported loads in transformers and gives the same logits."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.fuse import fuse
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.hf_export import export_hugging_face
from megatron_jam.weights.hf_import import read_hugging_face
from megatron_jam.weights.reference import reference_logits
from tests.helpers.commands import fails, tool
from tests.helpers.pico import LLAMA, pico_config, pico_folder, pico_tokenizer

CONFIGS = {
    "opt": pico_config("tower", bias=True, affine_norm=True),
    "cm3leon": pico_config("tower", activation="gelu", ffn_size=96),
    "llama": pico_config("tower", **LLAMA),
    "llama-untied": dataclasses.replace(pico_config("tower", **LLAMA, bias=True), tied=False),
}
TOKENS = torch.randint(4, 322, (2, 60), generator=torch.Generator().manual_seed(0))


def check(weights: Path, exported: Path) -> None:
    """transformers' logits are the reference's, and the way back is the identity."""
    certificate = export_hugging_face(weights, exported)
    assert certificate["largest_difference"] == 0
    made = json.loads((exported / "provenance.json").read_text())
    assert made["certificate"] == certificate
    model = AutoModelForCausalLM.from_pretrained(exported).eval().float()
    folder = WeightsFolder(weights)
    with torch.no_grad():
        found = model(TOKENS).logits
    due = reference_logits(folder.config, lambda name: folder.read(name).float(), TOKENS)
    assert due.std() > 0.1
    assert (found - due).abs().max() < 1e-4
    back = read_hugging_face(exported, weights)
    for name in folder.names:
        assert torch.equal(back.tensors[name].read(), folder.read(name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_gives_the_same_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check(pico_folder(tmp_path / "w", CONFIGS[kind], dtype=dtype), tmp_path / "hf")


@pytest.mark.parametrize("kind", ["opt", "cm3leon"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("uniform", {}), ("width", {"fill": "copy"}), ("width", {"fill": "average"})],
)
def test_fusions_of_one_tower_leave_as_stock_models(
    method: Any, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    for seed, name in enumerate(("text", "image")):
        pico_folder(tmp_path / name, CONFIGS[kind], seed=seed, dtype=torch.float32, scale=0.1)
    paths = {name: tmp_path / name for name in ("text", "image")}
    fuse(FusionRecipe(method=method, output=tmp_path / "child", **paths, **settings))
    check(tmp_path / "child", tmp_path / "hf")
    told = json.loads((tmp_path / "hf/config.json").read_text())
    assert told["architectures"] == ["OPTForCausalLM"]


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    weights = pico_folder(tmp_path / "w", CONFIGS["opt"], dtype=torch.float32)
    done = tool("convert_hf", "export", str(weights), "hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "a strawberry is a sweet red fruit"
    assert tokenizer(text, add_special_tokens=False).input_ids == pico_tokenizer().encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)


def test_folders_of_others_and_what_is_read_stay(tmp_path: Path) -> None:
    """A sharded download has an index like ours; a model must not replace what it is made of."""
    weights = pico_folder(tmp_path / "w", CONFIGS["opt"], dtype=torch.float32)
    export_hugging_face(weights, tmp_path / "hf")
    theirs = Path(shutil.copytree(tmp_path / "hf", tmp_path / "theirs"))
    shutil.copytree(weights, tmp_path / "other")
    (theirs / "provenance.json").unlink()
    for folder in ("theirs", "hf"):
        shutil.copyfile(weights / "vocabulary.json", tmp_path / folder / "vocabulary.json")
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    for arguments, message in [
        (("export", "w", "theirs"), "theirs is not replaced, as it has files but no provenance"),
        (("import", "theirs", "theirs"), "output theirs would replace theirs, which is read"),
        (("import", "hf", "hf"), "output hf would replace hf, which is read"),
        (("import", "hf", "w", "--tokenizer", "w"), "output w would replace w, which is read"),
        (("export", "w", "other"), "other is not replaced, as it is a weights folder"),
        (("export", "w", "w"), "output w would replace w, which is read"),
        (("export", "w", "hf", "--vq_model", "hf"), "output hf would replace hf, which is read"),
    ]:
        fails(tool("convert_hf", *arguments, cwd=tmp_path), message)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before


def test_options_of_the_import_alone_are_refused(tmp_path: Path) -> None:
    weights = pico_folder(tmp_path / "w", CONFIGS["opt"], dtype=torch.float32)
    arguments = ("export", str(weights), "hf", "--plan")
    fails(tool("convert_hf", *arguments, cwd=tmp_path), "--plan and --tokenizer are for import")


def test_damaged_weights_do_not_leave(tmp_path: Path) -> None:
    weights = pico_folder(tmp_path / "w", CONFIGS["opt"], dtype=torch.float32)
    (file,) = weights.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    fails(tool("convert_hf", "export", "w", "hf", cwd=tmp_path), "is not what was written")
    assert not (tmp_path / "hf").exists()


def test_the_image_tokenizer_is_known_on_the_way_back(tmp_path: Path) -> None:
    weights = pico_folder(tmp_path / "w", CONFIGS["opt"], dtype=torch.float32)
    provenance = json.loads((weights / "provenance.json").read_text())
    seen = {**provenance, "image_tokenizer_sha256": "ab" * 32}
    (weights / "provenance.json").write_text(json.dumps(seen))
    export_hugging_face(weights, tmp_path / "hf")
    read_hugging_face(tmp_path / "hf", tmp_path / "hf").write(tmp_path / "back")
    assert WeightsFolder(tmp_path / "back").image_tokenizer_sha256 == "ab" * 32
