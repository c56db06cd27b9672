"""Towers give the logits of transformers' OPT, Llama and Chameleon, from its own checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.parameters import parameter_table
from megatron_jam.weights.folder import FolderWriter, WeightsFolder
from megatron_jam.weights.huggingface import hugging_face_name, model_config
from megatron_jam.weights.reference import reference_logits
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


def convert(model: torch.nn.Module, settings: dict[str, Any], path: Path) -> WeightsFolder:
    """A weights folder of every tensor of `model`; none is left over."""
    config = model_config(settings)
    tensors = dict(model.named_parameters())
    names = {
        e.name: hugging_face_name(e.name, settings["model_type"]) for e in parameter_table(config)
    }
    assert sorted(names.values()) == sorted(tensors)
    shapes = {entry.name: entry.shape for entry in parameter_table(config)}
    source = pico_source(path.parent)
    with FolderWriter(
        path, config=config, source=source, shapes=shapes, dtype=torch.float32
    ) as writer:
        for name in shapes:
            writer.write(name, tensors[names[name]].detach().reshape(shapes[name]))
        writer.finish({"source": "transformers"})
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


def test_biases_in_attention_alone_are_refused() -> None:
    """Older files do not say `mlp_bias` at all."""
    _, settings = make("llama")
    del settings["mlp_bias"]
    assert not model_config(settings).towers["main"].bias
    with pytest.raises(UsageError, match="mlp_bias"):
        model_config({**settings, "attention_bias": True})
