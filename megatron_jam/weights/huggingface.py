"""Hugging Face's OPT, Llama and Chameleon in this project's terms: settings and names of tensors.

OWN is the kind of the models that bring their code along, with names and settings as here.

Nothing here needs `transformers`; its config.json is enough.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import MAIN, ModelConfig, TowerConfig

T = TypeVar("T")
_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a list of `name: value`",
}
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


@dataclass(frozen=True)
class Settings:
    """A config.json, or a part of one, whose values are checked as they are read."""

    values: Mapping[str, Any]
    """By name."""

    file: Path
    """Where they stand, for messages."""

    def get(self, name: str, kind: type[T], *default: T) -> T:
        """The value of `name`; the default where there is none.

        Raises:
            UsageError: it is of another kind, or there is none and no default.
        """
        value = self.values.get(name)
        # null is none or off; where the default is another, it is not meant by it.
        if default and (name not in self.values or (value is None and not default[0])):
            return default[0]
        if name not in self.values:
            raise UsageError(f"{self.file} lacks {name!r}")
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{self.file}: {name} is {value!r}; it must be {_EXPECTED[kind]}")
        return value

    def part(self, name: str) -> "Settings":
        """The settings that stand under `name`; none where there are none."""
        return Settings(self.get(name, dict, {}), self.file)


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


def model_config(values: Mapping[str, Any], file: Path = Path("config.json")) -> ModelConfig:
    """The model that a Hugging Face config.json describes.

    Args:
        values: what it holds.
        file: where it lies, for messages.

    Raises:
        UsageError: it is of another kind, lacks a setting or has one of another type, or an option
            that towers here do not have.
    """
    settings = Settings(values, file)
    kind = settings.get("model_type", str, "")
    if kind == OWN:
        return ModelConfig.from_dict(settings.get("model", dict, {}))
    if kind not in _NAMES:
        raise UsageError(f"model_type is {kind!r}; known are {sorted([*_NAMES, OWN])}")
    return ModelConfig(
        towers={MAIN: _opt(settings) if kind == "opt" else _llama(settings)},
        vocab_size=settings.get("vocab_size", int),
        max_positions=settings.get("max_position_embeddings", int),
        tied=settings.get("tie_word_embeddings", bool, kind == "opt"),
    )


def _opt(settings: Settings) -> TowerConfig:
    width = settings.get("hidden_size", int)
    _require(
        settings.get("do_layer_norm_before", bool, True), "do_layer_norm_before: false (OPT-350M)"
    )
    _require(
        settings.get("word_embed_proj_dim", int, width) == width,
        "another word_embed_proj_dim (OPT-350M)",
    )
    _require(not settings.get("_remove_final_layer_norm", bool, False), "_remove_final_layer_norm")
    return TowerConfig(
        num_layers=settings.get("num_hidden_layers", int),
        hidden_size=width,
        num_heads=settings.get("num_attention_heads", int),
        ffn_size=settings.get("ffn_dim", int),
        activation=_activation(settings.get("activation_function", str)),
        bias=settings.get("enable_bias", bool, True),
        affine_norm=settings.get("layer_norm_elementwise_affine", bool, True),
    )


def _llama(settings: Settings) -> TowerConfig:
    width, heads = settings.get("hidden_size", int), settings.get("num_attention_heads", int)
    rope = settings.part("rope_parameters")
    rope = rope if rope.values else settings.part("rope_scaling")
    scaling = rope.get("rope_type", str, rope.get("type", str, "default"))
    if scaling != "default":
        raise UsageError(f"rope_type is {scaling!r}; only unscaled rotations are supported")
    head_size = settings.get("head_dim", int, 0)
    if head_size and head_size * heads != width:
        raise UsageError(f"head_dim is {head_size}; it must be hidden_size / heads")
    bias = settings.get("attention_bias", bool, False)
    _require(settings.get("mlp_bias", bool, False) == bias, "mlp_bias other than attention_bias")
    _require(not settings.get("swin_norm", bool, False), "swin_norm (Chameleon-34B)")
    base = rope.get("rope_theta", float, 0.0) or settings.get("rope_theta", float, 0.0)
    return TowerConfig(
        num_layers=settings.get("num_hidden_layers", int),
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads", int, 0) or heads,
        ffn_size=settings.get("intermediate_size", int),
        activation=_activation(settings.get("hidden_act", str)),
        gated=True,
        bias=bias,
        norm="rms",
        affine_norm=True,
        norm_epsilon=settings.get("rms_norm_eps", float),
        qk_norm=settings.get("model_type", str) == "chameleon",
        positions="rope",
        rope_base=float(base or 10000.0),
    )


def _activation(name: str) -> Any:
    if name not in _ACTIVATIONS:
        raise UsageError(f"activation {name!r} is not supported; known are {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _require(supported: bool, what: str) -> None:
    """Refuse `what` unless it is supported."""
    if not supported:
        raise UsageError(f"towers do not support {what}")
