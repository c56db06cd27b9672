"""What no class of transformers computes leaves with code of its own, which stands alone."""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import BridgeConfig, ModelConfig
from megatron_jam.fusion.fuse import fuse
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import VOCABULARY, WeightsFolder
from megatron_jam.weights.hf_export import export_hugging_face
from megatron_jam.weights.hf_import import read_hugging_face
from megatron_jam.weights.reference import reference_logits
from megatron_jam.weights.verify import verify
from tests.helpers.commands import tool
from tests.helpers.pico import LLAMA, SEPARATE, pico_config, pico_folder

OPT = {"bias": True, "affine_norm": True}
TOKENS = torch.randint(4, 322, (2, 24), generator=torch.Generator().manual_seed(0))


def cross(kind: str = "cross", bridges: Any = None, text: Any = None, **settings: Any) -> Any:
    """A JAM-Cross of OPT-style towers, the text tower changed by `text`."""
    tower = settings.pop("tower", OPT)
    config = pico_config(kind, **tower)
    towers = dict(config.towers)
    towers["text"] = dataclasses.replace(towers["text"], **text or {})
    bridges = BridgeConfig(**bridges or {"every": 2})
    return dataclasses.replace(config, towers=towers, bridges=bridges, **settings)


MODELS: dict[str, ModelConfig] = {
    "cross": cross(),
    "cm3leon": cross(tower={}),
    "llama": cross(tower=LLAMA, tied=False),
    "chameleon": cross("separate", tower={**LLAMA, "qk_norm": True}, tied=False),
    "one-way": cross(bridges={"into": "image", "layers": [1, 3]}),
    "normed": cross(bridges={"kv_norm": True, "every": 1}),
    "no bridges": cross(bridges={"every": 0}),
    "separate": cross("separate"),
    "per tower": cross(tables="per_tower"),
    "wide": cross(head="wide"),
    "unlike": cross(text={"num_layers": 3, "hidden_size": 48, "num_heads": 6}, **SEPARATE),
    "unlike, shared": cross(
        text={"num_layers": 2, "hidden_size": 24, "num_heads": 3}, alignment=[1, 3]
    ),
    "unlike kinds": cross(text=LLAMA, **SEPARATE),
    "groups": pico_config("tower", **OPT, norm_groups=2),
    "epsilon": pico_config("tower", norm_epsilon=1e-6),
    "tower of chameleon": pico_config("tower", **LLAMA, qk_norm=True),
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where transformers puts the code that it loads."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def load(exported: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    return model.eval().float()


def export(config: ModelConfig, root: Path, **options: Any) -> tuple[WeightsFolder, Path]:
    weights = pico_folder(root / "w", config, dtype=torch.float32)
    assert export_hugging_face(weights, root / "hf", **options)["largest_difference"] == 0
    return WeightsFolder(weights), root / "hf"


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_generation(name: str, tmp_path: Path) -> None:
    folder, exported = export(MODELS[name], tmp_path)
    model = load(exported)
    with torch.no_grad():
        found = model(TOKENS).logits
    due = reference_logits(folder.config, folder.read, TOKENS)
    assert due.std() > 0.1
    assert (found - due).abs().max() < 1e-4
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, plain = (
        model.generate(
            TOKENS[:, :9],
            **settings,
            use_cache=use,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.sequences.shape == (2, 15)
    assert cached.past_key_values.get_seq_length() == 14
    for one, two in zip(cached.logits, plain.logits, strict=True):
        assert (one - two).abs().max() < 1e-4
    back = read_hugging_face(exported, folder.path)
    assert back.config == folder.config
    for each in folder.names:
        assert torch.equal(back.tensors[each].read(), folder.read(each)), each


def test_padding_beams_and_loss(tmp_path: Path) -> None:
    _, exported = export(MODELS["separate"], tmp_path)
    model = load(exported)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    padded = torch.cat([torch.ones(2, 3, dtype=torch.int64), TOKENS[:, :9]], dim=1)
    padded[1] = TOKENS[1, :12]
    together = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(together[:1, 3:], model.generate(TOKENS[:1, :9], **settings))
    assert torch.equal(together[1:], model.generate(TOKENS[1:, :12], **settings))
    beams = [
        model.generate(TOKENS[:, :9], **settings, num_beams=3, use_cache=use)
        for use in (True, False)
    ]
    assert torch.equal(*beams)
    found = model(TOKENS, labels=TOKENS)
    due = torch.nn.functional.cross_entropy(
        found.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    )
    assert torch.allclose(found.loss, due)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="static caches are not supported"):
        model.generate(TOKENS, **settings, cache_implementation="static")


def test_the_code_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, exported = export(MODELS["cross"], tmp_path)
    due = reference_logits(folder.config, folder.read, TOKENS)
    for path in exported.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                room = name.split(".")[0]
                assert room in {"torch", "transformers", *sys.stdlib_module_names}, name
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron_jam"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import megatron_jam  # noqa: F401
    model = load(exported)
    with torch.no_grad():
        assert (model(TOKENS).logits - due).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert (load(tmp_path / "again")(TOKENS).logits - due).abs().max() < 1e-4


def test_the_command_says_why(tmp_path: Path) -> None:
    weights = pico_folder(tmp_path / "w", MODELS["groups"], dtype=torch.bfloat16)
    done = tool("convert_hf", "export", str(weights), "hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no OPT has norm_groups 2; no Llama has learned positions" in done.stderr
    assert "the folder brings its own code (trust_remote_code=True)" in done.stderr
    done = tool("convert_hf", "import", "hf", "back", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    back = WeightsFolder(tmp_path / "back")
    assert back.provenance["sha256"] == WeightsFolder(weights).provenance["sha256"]
    verify(back.path)


@pytest.mark.parametrize("sentinels", [3, 5])
def test_the_tokenizer_of_another_model_is_refused(sentinels: int, tmp_path: Path) -> None:
    export_hugging_face(pico_folder(tmp_path / "w", MODELS["groups"]), tmp_path / "hf")
    other = JointVocabulary.build(text_size=300, num_image_codes=16, num_sentinels=sentinels)
    other.save(tmp_path / "hf" / VOCABULARY)
    message = rf"hf/config\.json says 322 ids, but the tokenizer has {other.size}"
    with pytest.raises(UsageError, match=message):
        read_hugging_face(tmp_path / "hf", tmp_path / "hf")


def test_a_diagonal_width(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("text", "image")}
    for seed, path in enumerate(paths.values()):
        pico_folder(path, pico_config("tower", **OPT), seed=seed, dtype=torch.float32)
    fuse(FusionRecipe(method="width", fill="diagonal", output=tmp_path / "w", **paths))
    export_hugging_face(tmp_path / "w", tmp_path / "hf")
    folder = WeightsFolder(tmp_path / "w")
    with torch.no_grad():
        found = load(tmp_path / "hf")(TOKENS).logits
    assert (found - reference_logits(folder.config, folder.read, TOKENS)).abs().max() < 1e-4


def test_own_code_can_be_asked_for(tmp_path: Path) -> None:
    folder, exported = export(pico_config("tower", **OPT), tmp_path, own_code=True)
    with torch.no_grad():
        found = load(exported)(TOKENS).logits
    assert (found - reference_logits(folder.config, folder.read, TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize("tower", [OPT, {**LLAMA, "qk_norm": True}], ids=["opt", "chameleon"])
def test_large_states_in_fp16(tower: dict[str, Any], tmp_path: Path) -> None:
    """transformers loads in the dtype that was written; squares and products must not overflow."""
    config = dataclasses.replace(pico_config("tower", **tower), tied=False)
    weights = pico_folder(tmp_path / "w", config, dtype=torch.float32)
    folder = WeightsFolder(weights)
    tensors = {name: folder.read(name) for name in folder.names}
    tensors["embedding.tokens.weight"][:, 5] = 300
    due = reference_logits(config, tensors.__getitem__, TOKENS)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    found = reference_logits(config, halves.__getitem__, TOKENS)
    assert found.dtype == torch.float16
    assert due.std() > 0.1
    assert (found.float() - due).abs().max() < 0.02 * due.abs().max()


def test_too_many_tokens_are_told(tmp_path: Path) -> None:
    _, exported = export(pico_config("tower", **OPT), tmp_path, own_code=True)
    model = load(exported)
    most = model.config.model["max_positions"]
    with torch.no_grad():
        assert model(torch.full((1, most), 5)).logits.isfinite().all()
        with pytest.raises(ValueError, match=f"the model has {most} positions; give fewer tokens"):
            model(torch.full((1, most + 1), 5))
