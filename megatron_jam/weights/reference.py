"""Any model of this project in plain torch, layer by layer: the specification of models/.

It shares no code with models/ and needs nothing but a way to get tensors by canonical name, so it
never holds more than one layer. Letters: B batch, S sequence, d width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.model import IMAGE, TEXT, ModelConfig, TowerConfig

GetTensor = Callable[[str], Tensor]


def reference_logits(config: ModelConfig, get: GetTensor, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of `tokens` int64 [B, S], in the dtype of the tensors that `get` returns."""
    states = {name: _embed(config, get, name, tokens) for name in config.tower_names}
    for layer in range(config.num_layers):
        for name, tower in config.towers.items():
            states[name] = _layer(tower, get, f"layers.{layer}.{name}", states[name])
        if config.has_bridge(layer):
            image, text = states[IMAGE], states[TEXT]
            towers = config.towers
            states = {
                IMAGE: _bridge(towers[IMAGE], get, f"bridges.{layer}.{IMAGE}", image, text),
                TEXT: _bridge(towers[TEXT], get, f"bridges.{layer}.{TEXT}", text, image),
            }
    if config.separate:
        return _separate_logits(config, get, states)
    if config.is_pair:
        joined = torch.cat([states[IMAGE], states[TEXT]], dim=-1)
        hidden = joined @ get("head.projection.weight").T
    else:
        (hidden,) = states.values()
    tower = config.towers[config.tower_names[0]]
    return _norm(tower, get, "head.norm", hidden) @ get("embedding.tokens.weight").T


def _embed(config: ModelConfig, get: GetTensor, name: str, tokens: Tensor) -> Tensor:
    room = f"embedding.{name}" if config.separate else "embedding"
    places = torch.arange(tokens.shape[1]) + config.position_offset
    return get(f"{room}.tokens.weight")[tokens] + get(f"{room}.positions.weight")[places]


def _separate_logits(config: ModelConfig, get: GetTensor, states: dict[str, Tensor]) -> Tensor:
    first, count = config.text_ids
    logits = {
        name: _norm(tower, get, f"head.{name}.norm", states[name])
        @ get(f"embedding.{name}.tokens.weight").T
        for name, tower in config.towers.items()
    }
    result = logits[IMAGE].clone()
    result[..., first : first + count] = logits[TEXT][..., first : first + count]
    return result


def _layer(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    inner = _norm(tower, get, f"{name}.attention_norm", x)
    x = x + _attention(tower, get, f"{name}.attention", inner, inner)
    return x + _ffn(tower, get, name, x)


def _bridge(tower: TowerConfig, get: GetTensor, name: str, x: Tensor, other: Tensor) -> Tensor:
    inner = _norm(tower, get, f"{name}.attention_norm", x)
    x = x + _attention(tower, get, f"{name}.attention", inner, other)
    return x + _ffn(tower, get, name, x)


def _attention(tower: TowerConfig, get: GetTensor, name: str, x: Tensor, source: Tensor) -> Tensor:
    def heads(kind: str, value: Tensor) -> Tensor:  # [B, heads, S, head size]
        projected = _linear(tower, get, f"{name}.{kind}", value)
        return projected.unflatten(-1, (tower.num_heads, -1)).transpose(1, 2)

    q, k, v = heads("q", x), heads("k", source), heads("v", source)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return _linear(tower, get, f"{name}.out", (weights @ v).transpose(1, 2).flatten(-2))


def _ffn(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    inner = _linear(tower, get, f"{name}.ffn.fc1", _norm(tower, get, f"{name}.ffn_norm", x))
    inner = F.relu(inner) if tower.activation == "relu" else F.gelu(inner, approximate="tanh")
    return _linear(tower, get, f"{name}.ffn.fc2", inner)


def _linear(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    y = x @ get(f"{name}.weight").T
    return y + get(f"{name}.bias") if tower.bias else y


def _norm(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + tower.norm_epsilon)
    return y * get(f"{name}.weight") + get(f"{name}.bias") if tower.affine_norm else y
