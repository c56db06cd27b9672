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
from megatron_jam.weights.lazy import Lazy, rows, same

OFFSET = 2
"""Rows of its position tables that no token has."""

_TOWERS = {"cm3": IMAGE, "llm": TEXT}
# One spelling of each number, and no more layers than any model has: int() would take others.
_LAYER = re.compile(
    r"decoder\.(?P<bridge>x_attn_)?layers(_(?P<tower>cm3|llm))?\.(?P<i>0|[1-9][0-9]{0,5})\.(?P<rest>.+)"
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
_TOKENS, _OUTPUT = "decoder.embed_tokens.weight", "decoder.output_projection.weight"

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
    every: int = 0,
) -> ModelConfig:
    """The model of a checkpoint: sizes by its tensors, the rest by its settings.

    Args:
        settings: `cfg`, of which section `model` counts.
        tensors: whole tensors by key.
        vocab_size: ids of the tokenizer; further rows are padding.
        num_heads: in place of the settings'; 0 takes theirs.
        activation: likewise; "" takes theirs.
        every: after each how many layers bridges stand; 0 takes it from how many there are.

    Raises:
        UsageError: towers here cannot compute such a model, or the settings say too little.
    """
    known = settings.get("model") or {}
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
    heads = num_heads or _said(known, "decoder_attention_heads", int, "num_heads")
    form = activation or _said(known, "activation_fn", str, "activation")
    positions = _positions(tensors).shape[0] - OFFSET
    towers = {
        _TOWERS.get(tower or "", MAIN): _tower(tensors, tower, len(found), heads, form)
        for tower, found in numbers.items()
    }
    every = _every(max(map(len, numbers.values())), len(bridges), every)
    return ModelConfig(
        towers={name: towers[name] for name in (MAIN, IMAGE, TEXT) if name in towers},
        vocab_size=vocab_size,
        max_positions=positions,
        position_offset=OFFSET,
        tied=_is_tied(known, tensors, vocab_size),
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


def _said(known: Mapping[str, Any], name: str, kind: type, option: str) -> Any:
    """A setting of the checkpoint that an option can give in its place."""
    found = known.get(name)
    if not found:
        raise UsageError(f"the checkpoint's settings do not say {name}: add --{option}")
    if type(found) is not kind:
        raise UsageError(f"the checkpoint's settings say {name}: {found!r}: add --{option}")
    return found


def _is_tied(known: Mapping[str, Any], tensors: Mapping[str, Lazy], vocab_size: int) -> bool:
    """Whether the token table gives the logits: as its settings say, else if no other rows do."""
    said = known.get("share_decoder_input_output_embed")
    if said is not None:
        return bool(said)
    tables = [tensors[key] for key in (_TOKENS, _OUTPUT) if key in tensors]
    # Rows of padding are dropped, and may be anything.
    tables = [rows(each, 0, min(each.shape[0], vocab_size)) for each in tables]
    return len(tables) < 2 or same(*tables)


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
        raise UsageError(f"the checkpoint's activation is {form}; known are {sorted(forms)}")
    if len(fc1.shape) != 2:
        raise UsageError(
            f"{room}.fc1.weight has shape {list(fc1.shape)}, but a matrix is due: is this a"
            " checkpoint of metaseq?"
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


def _every(layers: int, bridges: int, said: int) -> int:
    """After each how many layers a bridge stands: as is said, or the only number that fits."""
    if not bridges and not said:
        return 0
    fitting = [n for n in range(1, layers + 1) if math.ceil(layers / n) == bridges]
    there = f"the checkpoint has {bridges} bridges a direction and {layers} layers"
    if not fitting:
        raise UsageError(f"{there}, which do not fit" + (": leave --every out" if said else ""))
    if said and said not in fitting:
        raise UsageError(f"{there}: --every {said} does not fit, but {fitting} do")
    if not said and len(fitting) > 1:
        raise UsageError(f"{there}: say after each how many one stands, --every of {fitting}")
    return said or fitting[0]


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
