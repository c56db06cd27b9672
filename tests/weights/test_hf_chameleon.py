"""Chameleon: ids by the names of its tokens, and the way back as transformers' own class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.fuse import fuse
from megatron_jam.weights.folder import FolderWriter, WeightsFolder
from megatron_jam.weights.hf_export import export_hugging_face
from megatron_jam.weights.hf_import import read_hugging_face
from megatron_jam.weights.reference import reference_logits
from tests.helpers.commands import tool
from tests.helpers.mixed import mixed_tokenizer

CODES = 16
VQ = {
    "num_embeddings": CODES,
    "embed_dim": 8,
    "latent_channels": 8,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}


def save_chameleon(path: Path, *, seed: int = 0) -> tuple[Any, list[str]]:
    """A Chameleon as transformers saves it, with its tokenizer; the names of its ids."""
    content, names = mixed_tokenizer(codes=CODES, marks="reserved", seed=1)
    settings = transformers.ChameleonConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        vocabulary_map={name: number for number, name in enumerate(names)},
        vq_config=VQ,
        bos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    model = transformers.ChameleonForConditionalGeneration(settings).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if not key.startswith("model.vqmodel."):
                weight.normal_(0, 0.15)
                weight += 1 if "norm" in key and key.endswith("weight") else 0
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return model, names


def all_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Without the ban on image tokens in its forward."""
    with torch.no_grad():
        return model.lm_head(model.model(tokens).last_hidden_state)


def test_there_and_back(tmp_path: Path) -> None:
    model, names = save_chameleon(tmp_path / "hf")
    done = tool("convert_hf", "import", "hf", "ours", "--plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if "lm_head" in x]
    assert "copy, order rows by name" in line
    certificate = read_hugging_face(tmp_path / "hf", tmp_path / "hf").write(tmp_path / "ours")
    assert certificate["largest_difference"] < 1e-5
    folder = WeightsFolder(tmp_path / "ours")
    vocabulary = folder.vocabulary
    assert vocabulary.size == len(names)
    # The ids of the same tokens there and here.
    codes = torch.tensor([3, 0, 15, 7])
    there = [names.index(name) for name in ("</s>", "<racm3:break>")]
    there += model.model.vocabulary_mapping.convert_img2bpe(codes).tolist()
    here = [vocabulary.eos, vocabulary.break_, *vocabulary.image_id(codes.numpy()).tolist()]
    due = all_logits(model, torch.tensor([there]))
    found = reference_logits(folder.config, folder.read, torch.tensor([here]))
    assert due.std() > 0.3
    image = slice(vocabulary.image.start, vocabulary.image.stop)
    mapping = model.model.vocabulary_mapping.img2bpe_mapping_tensor.long()
    assert (found[..., image] - due[..., mapping]).abs().max() < 1e-4
    assert (found[..., vocabulary.break_] - due[..., there[1]]).abs().max() < 1e-4
    export_hugging_face(tmp_path / "ours", tmp_path / "back", vq_model=tmp_path / "hf")
    again = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "back")
    tokens = torch.tensor([here])
    assert (all_logits(again, tokens) - found).abs().max() < 1e-4
    with torch.no_grad():
        text = again(tokens).logits[..., : vocabulary.text.stop]
    assert (text - found[..., : vocabulary.text.stop]).abs().max() < 1e-4
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        of_source, of_result = model.get_image_tokens(pixels), again.get_image_tokens(pixels)
    bpe2img = model.model.vocabulary_mapping.bpe2img
    seen = [[bpe2img[each] for each in row] for row in of_source.tolist()]
    assert len(set(seen[0] + seen[1])) > 1
    assert of_result.tolist() == vocabulary.image_id(seen).tolist()


def test_a_fusion_of_chameleons_leaves_as_one(tmp_path: Path) -> None:
    for seed, name in enumerate(("chameleon", "anole")):
        save_chameleon(tmp_path / name, seed=seed)
        read_hugging_face(tmp_path / name, tmp_path / name).write(tmp_path / f"{name}_ours")
    paths = {"text": tmp_path / "chameleon_ours", "image": tmp_path / "anole_ours"}
    fuse(FusionRecipe(method="uniform", output=tmp_path / "child", **paths))
    export_hugging_face(tmp_path / "child", tmp_path / "hf", vq_model=tmp_path / "anole")
    saved = load_file(tmp_path / "anole" / "model.safetensors")
    made = load_file(next((tmp_path / "hf").glob("*.safetensors")))
    assert made.keys() == saved.keys()
    for key in saved:
        if key.startswith("model.vqmodel."):
            assert torch.equal(made[key], saved[key]), key
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    folder = WeightsFolder(tmp_path / "child")
    tokens = torch.randint(4, 320, (1, 20), generator=torch.Generator().manual_seed(0))
    due = reference_logits(folder.config, folder.read, tokens)
    assert (all_logits(model, tokens) - due).abs().max() < 1e-4


def test_an_image_tokenizer_of_other_codes_is_refused(tmp_path: Path) -> None:
    save_chameleon(tmp_path / "hf")
    read_hugging_face(tmp_path / "hf", tmp_path / "hf").write(tmp_path / "ours")
    settings = json.loads((tmp_path / "hf/config.json").read_text())
    settings["vq_config"]["num_embeddings"] = 8192
    (tmp_path / "hf/config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="has 8192 image codes, the model 16"):
        export_hugging_face(tmp_path / "ours", tmp_path / "back", vq_model=tmp_path / "hf")
    assert not (tmp_path / "back").exists()
    with pytest.raises(UsageError, match="--vq_model is for models that leave as a Chameleon"):
        export_hugging_face(
            tmp_path / "ours", tmp_path / "back", vq_model=tmp_path / "hf", own_code=True
        )


def test_an_image_tokenizer_that_does_not_fit_the_dtype_is_refused(tmp_path: Path) -> None:
    save_chameleon(tmp_path / "hf")
    read_hugging_face(tmp_path / "hf", tmp_path / "hf").write(tmp_path / "ours")
    ours = WeightsFolder(tmp_path / "ours")
    shapes = {name: ours.shape(name) for name in ours.names}
    with FolderWriter(
        tmp_path / "half", config=ours.config, source=ours.path, shapes=shapes, dtype=torch.float16
    ) as writer:
        for name in ours.names:
            writer.write(name, ours.read(name))
        writer.finish({})
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    key = next(name for name in tensors if name.startswith("model.vqmodel."))
    tensors[key].view(-1)[0] = 1e6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match=f"{key} has numbers too large for torch.float16"):
        export_hugging_face(tmp_path / "half", tmp_path / "back", vq_model=tmp_path / "hf")
    assert not (tmp_path / "back").exists()
