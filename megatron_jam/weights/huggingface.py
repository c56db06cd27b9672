"""Hugging Face's OPT, Llama and Chameleon in this project's terms: settings and names of tensors.

OWN is the kind of the models that bring their code along, with names and settings as here.

Nothing here needs `transformers`; its config.json is enough.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import MAIN, ModelConfig, TowerConfig

_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "silu"}

_OPT = {
    "embedding.tokens": "model.decoder.embed_tokens",
    "embedding.positions": "model.decoder.embed_positions",
    "attention_norm": "self_attn_layer_norm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn.fc1": "fc1",
    "ffn.fc2": "fc2",
    "head.norm": "model.decoder.final_layer_norm",
    "head.output": "lm_head",
}
_LLAMA = {
    "embedding.tokens": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.fc1": "mlp.up_proj",
    "ffn.fc2": "mlp.down_proj",
    "head.norm": "model.norm",
    "head.output": "lm_head",
}
OWN = "megatron_jam"
_NAMES = {"opt": _OPT, "llama": _LLAMA, "chameleon": _LLAMA}
_LAYERS = {"opt": "model.decoder.layers", "llama": "model.layers", "chameleon": "model.layers"}


def hugging_face_name(name: str, model_type: str) -> str:
    """The name there of a tower's tensor `name` here, for an "opt", "llama" or "chameleon"; of any
    model's for OWN."""
    if model_type == OWN:
        return name
    names = _NAMES[model_type]
    stem, kind = name.rsplit(".", 1)
    if layer := re.fullmatch(rf"layers\.(\d+)\.{MAIN}\.(.*)", stem):
        return f"{_LAYERS[model_type]}.{layer[1]}.{names[layer[2]]}.{kind}"
    return f"{names[stem]}.{kind}"


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    Raises:
        UsageError: it is of another kind, or has an option that towers here do not have.
    """
    kind = settings.get("model_type")
    if kind == OWN:
        return ModelConfig.from_dict(settings.get("model", {}))
    if kind not in _NAMES:
        raise UsageError(f"model_type is {kind!r}; known are {sorted([*_NAMES, OWN])}")
    try:
        return ModelConfig(
            towers={MAIN: _opt(settings) if kind == "opt" else _llama(settings)},
            vocab_size=settings["vocab_size"],
            max_positions=settings["max_position_embeddings"],
            tied=settings.get("tie_word_embeddings", kind == "opt"),
        )
    except KeyError as error:
        raise UsageError(f"the {kind} config.json lacks {error}") from error


def _opt(settings: Mapping[str, Any]) -> TowerConfig:
    width = settings["hidden_size"]
    _require(settings.get("do_layer_norm_before", True), "do_layer_norm_before: false (OPT-350M)")
    _require(
        settings.get("word_embed_proj_dim", width) == width,
        "another word_embed_proj_dim (OPT-350M)",
    )
    _require(not settings.get("_remove_final_layer_norm", False), "_remove_final_layer_norm")
    return TowerConfig(
        num_layers=settings["num_hidden_layers"],
        hidden_size=width,
        num_heads=settings["num_attention_heads"],
        ffn_size=settings["ffn_dim"],
        activation=_activation(settings["activation_function"]),
        bias=settings.get("enable_bias", True),
        affine_norm=settings.get("layer_norm_elementwise_affine", True),
    )


def _llama(settings: Mapping[str, Any]) -> TowerConfig:
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UsageError(f"rope_type is {scaling!r}; only unscaled rotations are supported")
    if (settings.get("head_dim") or width // heads) != width // heads:
        raise UsageError(f"head_dim is {settings['head_dim']}; it must be hidden_size / heads")
    bias = settings.get("attention_bias", False)
    _require(settings.get("mlp_bias", False) == bias, "mlp_bias other than attention_bias")
    _require(not settings.get("swin_norm", False), "swin_norm (Chameleon-34B)")
    return TowerConfig(
        num_layers=settings["num_hidden_layers"],
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        ffn_size=settings["intermediate_size"],
        activation=_activation(settings["hidden_act"]),
        gated=True,
        bias=bias,
        norm="rms",
        affine_norm=True,
        norm_epsilon=settings["rms_norm_eps"],
        qk_norm=settings["model_type"] == "chameleon",
        positions="rope",
        rope_base=float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0),
    )


def _activation(name: str) -> Any:
    if name not in _ACTIVATIONS:
        raise UsageError(f"activation {name!r} is not supported; known are {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _require(supported: bool, what: str) -> None:
    """Refuse `what` unless it is supported."""
    if not supported:
        raise UsageError(f"towers do not support {what}")
