"""Towers give the logits of transformers' OPT, Llama and Chameleon, from its own checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.hf_import import read_hugging_face
from megatron_jam.weights.huggingface import model_config
from megatron_jam.weights.reference import reference_logits
from megatron_jam.weights.stream import INDEX
from tests.helpers.commands import fails, tool
from tests.helpers.pico import pico_source, pico_vocabulary
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import whole_logits

SIZES = {
    "vocab_size": pico_vocabulary().size,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
OPT = {"ffn_dim": 160, "word_embed_proj_dim": 64}
CM3LEON = {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}
LLAMA = {"intermediate_size": 160}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", OPT),
    "cm3leon-relu": ("opt", CM3LEON),
    "cm3leon-gelu": ("opt", {**CM3LEON, "activation_function": "gelu_new"}),
    "llama": ("llama", {**LLAMA, "rms_norm_eps": 1e-6}),
    "llama-grouped": ("llama", {**LLAMA, "num_key_value_heads": 2}),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True, "rope_theta": 5e5}),
    "llama-bias": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "chameleon": ("chameleon", {**LLAMA, "num_key_value_heads": 4}),
    "chameleon-grouped": ("chameleon", {**LLAMA, "num_key_value_heads": 2}),
}


def make(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """transformers' model with random weights, none of which is zero, and its config.json."""
    kind, options = MODELS[name]
    settings: dict[str, Any] = {**SIZES, **options}
    torch.manual_seed(0)
    if kind == "opt":
        model: Any = transformers.OPTForCausalLM(transformers.OPTConfig(**settings))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    else:
        settings["vocabulary_map"] = {"<image>": 5}
        model = ChameleonText(transformers.ChameleonConfig(**settings))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(0, 0.15)
            if "norm" in key and key.endswith("weight"):
                weight += 1
    return model.eval(), model.config.to_dict()


class ChameleonText(torch.nn.Module):
    """Chameleon without its image tokenizer, and without its ban on image tokens in the logits."""

    def __init__(self, config: transformers.ChameleonConfig) -> None:
        super().__init__()
        self.config = config
        self.model = transformers.ChameleonModel(config)
        del self.model.vqmodel
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Any:
        states = self.model(tokens).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(states))


def convert(model: Any, settings: dict[str, Any], path: Path) -> WeightsFolder:
    """A weights folder of every tensor of `model`, which is saved as transformers saves it."""
    saved = path.with_name(f"{path.name}_saved")
    if isinstance(model, ChameleonText):
        saved.mkdir()
        save_file(dict(model.named_parameters()), saved / "model.safetensors")
        (saved / "config.json").write_text(json.dumps(settings))
    else:
        model.save_pretrained(saved, max_shard_size="100kB")
    read_hugging_face(saved, pico_source(path.parent)).write(path)
    return WeightsFolder(path)


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path, pool: WorkerPool) -> None:
    """Reference and model, fp32, two rows of 128 tokens."""
    model, settings = make(name)
    folder = convert(model, settings, tmp_path / name)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, SIZES["vocab_size"], (2, 128), generator=generator)
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.3
    reference = reference_logits(folder.config, folder.read, tokens)
    ours = pool.run(whole_logits, ParallelConfig(), folder.path, tokens, torch.float32)[0]
    assert (reference - expected).abs().max() < 1e-4
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("opt", {"model_type": "bert"}, "bert"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("opt", {"activation_function": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
        ("llama", {"head_dim": 32}, "head_dim"),
        ("llama", {"attention_bias": True}, "mlp_bias"),
        ("chameleon", {"swin_norm": True}, "swin_norm"),
    ],
)
def test_refuses_what_towers_lack(name: str, changed: dict[str, Any], words: str) -> None:
    _, settings = make(name)
    with pytest.raises(UsageError, match=words):
        model_config({**settings, **changed})


@pytest.mark.parametrize(("name", "missing"), [("opt", "ffn_dim"), ("llama", "rms_norm_eps")])
def test_a_missing_setting_is_named(name: str, missing: str) -> None:
    _, settings = make(name)
    del settings[missing]
    with pytest.raises(UsageError, match=f"config.json lacks '{missing}'"):
        model_config(settings)


@pytest.mark.parametrize(
    ("name", "setting", "value", "due"),
    [
        ("opt", "activation_function", ["relu"], "text"),
        ("opt", "model_type", ["opt"], "text"),
        ("opt", "hidden_size", None, "a whole number"),
        ("opt", "num_hidden_layers", "3", "a whole number"),
        ("opt", "ffn_dim", 160.0, "a whole number"),
        ("opt", "enable_bias", None, "true or false"),
        ("opt", "do_layer_norm_before", "false", "true or false"),
        ("opt", "tie_word_embeddings", 1, "true or false"),
        ("llama", "num_attention_heads", "4", "a whole number"),
        ("llama", "hidden_size", [64], "a whole number"),
        ("llama", "num_key_value_heads", {}, "a whole number"),
        ("llama", "rms_norm_eps", "1e-6", "a number"),
        ("llama", "rope_parameters", "default", "a list of `name: value`"),
        ("llama", "rope_scaling", [1], "a list of `name: value`"),
        ("llama", "rope_theta", "much", "a number"),
        ("llama", "attention_bias", [], "true or false"),
    ],
)
def test_a_setting_of_another_type_is_named(
    name: str, setting: str, value: object, due: str
) -> None:
    _, settings = make(name)
    older = {"rope_parameters": None}  # says it in other places
    changed = {**settings, **older, setting: value}
    with pytest.raises(UsageError) as caught:
        model_config(changed, Path("hf/config.json"))
    assert str(caught.value) == f"hf/config.json: {setting} is {value!r}; it must be {due}"


def test_null_is_none_and_no_heads_are_refused() -> None:
    _, settings = make("llama")
    due = model_config(settings)
    nulls = dict.fromkeys(["head_dim", "num_key_value_heads", "mlp_bias", "rope_scaling"])
    assert model_config({**settings, **nulls}) == due
    with pytest.raises(UsageError, match="num_heads is 0"):
        model_config({**settings, "num_attention_heads": 0, "head_dim": None})


def test_biases_in_attention_alone_are_refused() -> None:
    """Older files do not say `mlp_bias` at all."""
    _, settings = make("llama")
    del settings["mlp_bias"]
    assert not model_config(settings).towers["main"].bias
    with pytest.raises(UsageError, match="mlp_bias"):
        model_config({**settings, "attention_bias": True})


def save_opt(path: Path, **settings: Any) -> Path:
    """An OPT with more token rows than ids, in half precision."""
    options = {**SIZES, **OPT, **settings}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**options)).half()
    model.save_pretrained(path)
    return path


def test_padding_goes_and_the_certificate_stays(tmp_path: Path) -> None:
    source = save_opt(tmp_path / "opt", vocab_size=SIZES["vocab_size"] + 6)
    arguments = ("import", "opt", "out", "--tokenizer", str(pico_source(tmp_path)))
    planned = tool("convert_hf", *arguments, "--plan", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    (line,) = [x for x in planned.stdout.splitlines() if "model.decoder.embed_tokens" in x]
    assert line.split("  ")[-1] == "embedding.tokens.weight"
    assert "copy, drop 6 rows" in line
    assert not (tmp_path / "out").exists()
    done = tool("convert_hf", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = "opt: its last 6 of 328 token rows are beyond the tokenizer's 322 ids and are left out"
    for each in (planned, done):
        assert told in each.stderr
    folder = WeightsFolder(tmp_path / "out")
    assert folder.config.vocab_size == pico_vocabulary().size
    assert folder.provenance["certificate"]["largest_difference"] == 0
    rows = load_file(source / "model.safetensors")["model.decoder.embed_tokens.weight"]
    assert torch.equal(folder.read("embedding.tokens.weight"), rows[:-6])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("extra", "has model.extra.weight, which no known model has"),
        ("missing", "has no tensor model.decoder.layers.1.fc1.weight, which gives layers.1.main"),
        ("shape", r"has shape \[3\], but layers.1.main.ffn.fc1.bias is \[160\]"),
        ("dtype", "is I64, quantised or no weight"),
        ("damaged", "is damaged"),
        ("none", "has neither model.safetensors nor"),
        ("index", "index.json is damaged: its weight_map does not give each tensor's file"),
        ("setting", "opt/config.json: activation_function is .'relu'.; it must be text"),
        ("tokenizer", "has 1,000 token rows, but the tokenizer has 322 ids"),
    ],
)
def test_what_does_not_fit_is_named(spoil: str, message: str, tmp_path: Path) -> None:
    source = save_opt(tmp_path / "opt", **{"vocab_size": 1000} if spoil == "tokenizer" else {})
    path = source / "model.safetensors"
    tensors = load_file(path)
    if spoil == "extra":
        tensors["model.extra.weight"] = torch.ones(2)
    elif spoil == "missing":
        del tensors["model.decoder.layers.1.fc1.weight"]
    elif spoil == "shape":
        tensors["model.decoder.layers.1.fc1.bias"] = torch.ones(3).half()
    elif spoil == "dtype":
        tensors["model.decoder.layers.1.fc1.bias"] = torch.ones(160, dtype=torch.int64)
    save_file(tensors, path)
    if spoil == "damaged":
        path.write_bytes(path.read_bytes()[:-1000])
    elif spoil == "none":
        path.unlink()
    elif spoil == "index":
        (source / INDEX).write_text('{"weight_map": null}')
    elif spoil == "setting":
        settings = json.loads((source / "config.json").read_text())
        settings["activation_function"] = ["relu"]
        (source / "config.json").write_text(json.dumps(settings))
    arguments = ("import", "opt", "out", "--tokenizer", str(pico_source(tmp_path)))
    fails(tool("convert_hf", *arguments, cwd=tmp_path), message)
    assert not (tmp_path / "out").exists()


def test_a_token_table_of_one_number_is_refused(tmp_path: Path) -> None:
    source = save_opt(tmp_path / "opt")
    path = source / "model.safetensors"
    key = "model.decoder.embed_tokens.weight"
    save_file(load_file(path) | {key: torch.tensor(1.0).half()}, path)
    with pytest.raises(UsageError, match=rf"{key} has shape \[\], but embedding.tokens.weight is"):
        read_hugging_face(source, pico_source(tmp_path))
