"""What metaseq's settings and tensors are called here: OPT, CM3leon, and the authors' JAM-Cross.

Two of its names mislead: `final_layer_norm` is the FFN's, in each layer, and of a gated FFN `fc1`
goes through the activation and `activation_fn.gate` does not.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import IMAGE, MAIN, TEXT, BridgeConfig, ModelConfig, TowerConfig
from megatron_jam.weights.lazy import Lazy

OFFSET = 2
"""Rows of its position tables that no token has."""

_TOWERS = {"cm3": IMAGE, "llm": TEXT}
_LAYER = re.compile(
    r"decoder\.(?P<bridge>x_attn_)?layers(_(?P<tower>cm3|llm))?\.(?P<i>\d+)\.(?P<rest>.+)"
)
_IN_LAYER = {
    "self_attn_layer_norm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.out_proj": "attention.out",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn.fc1",
    "fc2": "ffn.fc2",
}
_IN_GATED_LAYER = {**_IN_LAYER, "fc1": "ffn.gate", "activation_fn.gate": "ffn.fc1"}
_OUTSIDE = {
    "decoder.embed_tokens.weight": "embedding.tokens.weight",
    "decoder.embed_positions.weight": "embedding.positions.weight",
    "decoder.embed_positions_cm3.weight": "embedding.positions.weight",
    "decoder.layer_norm.weight": "head.norm.weight",
    "decoder.layer_norm.bias": "head.norm.bias",
    "decoder.feature_projection.weight": "head.projection.weight",
    "decoder.output_projection.weight": "head.output.weight",
}
_OUTPUT = "decoder.output_projection.weight"

_REFUSED_KEYS = {
    "decoder.project_in_dim.weight": "embeddings of another width (OPT-350M)",
    "decoder.project_out_dim.weight": "embeddings of another width (OPT-350M)",
}
# Setting: what it may say here, and what anything else would be. What is not said is as here.
_KNOWN_SETTINGS: dict[str, tuple[Any, str]] = {
    "decoder_normalize_before": (True, "norms behind each block (OPT-350M)"),
    "no_scale_embedding": (True, "scaled embeddings"),
    "alibi": (False, "ALiBi"),
    "decoder_learned_pos": (True, "positions that are not learned"),
    "decoder_learned_sinusoidal": (False, "sinusoidal positions"),
    "use_stable_embedding": (False, "a norm behind the embedding"),
    "layernorm_embedding": (False, "a norm behind the embedding"),
    "scale_fc": (False, "a norm within the FFN"),
    "scale_attn": (False, "a norm behind the attention"),
    "scale_heads": (False, "a scale for each head"),
    "scale_resids": (False, "scaled residuals"),
    "self_attn_doc_sep": (-1, "attention that ends where a token says so"),
}
_FORMS = {"relu": "relu", "gelu": "gelu"}
_GATED_FORMS = {"swiglu": "silu", "geglu": "gelu"}


def model_config(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    *,
    vocab_size: int,
    num_heads: int = 0,
    activation: str = "",
) -> ModelConfig:
    """The model of a checkpoint: sizes by its tensors, the rest by its settings.

    Args:
        settings: `cfg`, of which section `model` counts.
        tensors: whole tensors by key.
        vocab_size: ids of the tokenizer; further rows are padding.
        num_heads: in place of the settings'; 0 takes theirs.
        activation: likewise; "" takes theirs.

    Raises:
        UsageError: towers here cannot compute such a model, or the settings say too little.
    """
    known = settings.get("model") or {}
    known = known if isinstance(known, dict) else {}
    _check_supported(known, tensors)
    numbers: dict[str | None, set[int]] = {}
    bridges: set[int] = set()
    for match in filter(None, map(_LAYER.fullmatch, tensors)):
        if match["bridge"]:
            bridges.add(int(match["i"]))
        else:
            numbers.setdefault(match["tower"], set()).add(int(match["i"]))
    if not numbers:
        raise UsageError("the checkpoint has no decoder.layers: it is no language model")
    for tower, found in numbers.items():
        if found != set(range(len(found))):
            missing = min(set(range(max(found))) - found)
            raise UsageError(f"layer {missing} of {tower or 'the decoder'} is missing")
    heads = num_heads or known.get("decoder_attention_heads") or 0
    if not heads:
        raise UsageError("the checkpoint does not say how many heads it has: add --num_heads")
    form = activation or known.get("activation_fn") or ""
    positions = _positions(tensors).shape[0] - OFFSET
    towers = {
        _TOWERS.get(tower or "", MAIN): _tower(tensors, tower, len(found), int(heads), form)
        for tower, found in numbers.items()
    }
    every = _every(max(map(len, numbers.values())), len(bridges))
    return ModelConfig(
        towers={name: towers[name] for name in (MAIN, IMAGE, TEXT) if name in towers},
        vocab_size=vocab_size,
        max_positions=positions,
        position_offset=OFFSET,
        tied=known.get("share_decoder_input_output_embed") is not False,
        bridges=BridgeConfig(every=every) if IMAGE in towers else BridgeConfig(),
    )


def _check_supported(known: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> None:
    for key, what in _REFUSED_KEYS.items():
        if key in tensors:
            raise UsageError(f"towers here have no {what}: {key}")
    for name, (value, what) in _KNOWN_SETTINGS.items():
        said = known.get(name)
        if said is not None and said != value:
            raise UsageError(f"towers here have no {what}: its settings say {name}: {said}")


def _positions(tensors: Mapping[str, Lazy]) -> Lazy:
    for key in ("decoder.embed_positions.weight", "decoder.embed_positions_cm3.weight"):
        if key in tensors:
            return tensors[key]
    raise UsageError("the checkpoint has no table of positions, which towers like it need here")


def _tower(
    tensors: Mapping[str, Lazy], tower: str | None, layers: int, heads: int, form: str
) -> TowerConfig:
    room = f"decoder.layers{f'_{tower}' if tower else ''}.0"
    fc1 = tensors.get(f"{room}.fc1.weight")
    if fc1 is None:
        raise UsageError(f"the checkpoint lacks {room}.fc1.weight")
    is_gated = f"{room}.activation_fn.gate.weight" in tensors
    forms = _GATED_FORMS if is_gated else _FORMS
    if form not in forms:
        raise UsageError(
            f"the checkpoint's activation is {form or 'not said'}; "
            + (f"known are {sorted(forms)}" if form else "add --activation")
        )
    inner, width = fc1.shape
    return TowerConfig(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        ffn_size=0 if inner == 4 * width else inner,
        activation=forms[form],  # type: ignore[arg-type]
        gated=is_gated,
        bias=f"{room}.fc1.bias" in tensors,
        affine_norm=f"{room}.final_layer_norm.weight" in tensors,
    )


def _every(layers: int, bridges: int) -> int:
    """After which layers bridges stand, from how many there are."""
    if bridges == 0:
        return 0
    fitting = [every for every in range(1, layers + 1) if math.ceil(layers / every) == bridges]
    if not fitting:
        raise UsageError(f"{bridges} bridges a direction do not fit {layers} layers")
    return fitting[0]


def why_dropped(key: str, config: ModelConfig) -> str:
    """Why nothing here needs a whole tensor; "" of one that is needed, or unknown."""
    if key == "decoder.version":
        return "a mark of the format"
    return "tied: the token table" if key == _OUTPUT and config.tied else ""


def canonical_name(key: str, config: ModelConfig) -> str | None:
    """Our name of a whole tensor; None of one that is unknown."""
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    match = _LAYER.fullmatch(key)
    if match is None or bool(match["tower"]) != config.is_pair:
        return None
    tower = _TOWERS.get(match["tower"] or "", MAIN)
    stem, _, kind = match["rest"].rpartition(".")
    names = _IN_GATED_LAYER if config.towers[tower].gated else _IN_LAYER
    if stem not in names or kind not in ("weight", "bias"):
        return None
    number = int(match["i"])
    if match["bridge"]:
        return f"bridges.{number * config.bridges.every}.{tower}.{names[stem]}.{kind}"
    return f"layers.{number}.{tower}.{names[stem]}.{kind}"
