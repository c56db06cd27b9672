"""Any model of this project in plain torch, layer by layer: the specification of models/.

It shares no code with models/ and needs nothing but a way to get tensors by canonical name, so it
never holds more than one layer. Letters: B batch, S sequence, d width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.model import IMAGE, MAIN, TEXT, ModelConfig, TowerConfig

GetTensor = Callable[[str], Tensor]


def reference_logits(config: ModelConfig, get: GetTensor, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of `tokens` int64 [B, S], in the dtype of the tensors that `get` returns."""
    states = {name: _embed(config, get, name, tokens) for name in config.tower_names}
    for layer in range(config.num_layers):
        for name, tower in config.towers.items():
            own = config.tower_layer(name, layer)
            if own is not None:
                states[name] = _layer(tower, get, f"layers.{own}.{name}", states[name])
        before = dict(states)  # both directions read the states from before either update
        for name in config.bridges_into(layer):
            other = before[TEXT if name == IMAGE else IMAGE]
            states[name] = _bridge(config, get, f"bridges.{layer}.{name}", before[name], other)
    if config.readers == (MAIN,):
        return _read(config, get, None, states)
    # Rows of text ids read the text tower, all others the image tower.
    logits = _read(config, get, IMAGE, states)
    rows = slice(config.text_ids[0], sum(config.text_ids))
    logits[..., rows] = _read(config, get, TEXT, states)[..., rows]
    return logits


def _embed(config: ModelConfig, get: GetTensor, name: str, tokens: Tensor) -> Tensor:
    room = f"embedding.{name}" if config.is_pair and config.tables == "per_tower" else "embedding"
    state = get(f"{room}.tokens.weight")[tokens]
    if config.towers[name].positions == "learned":
        places = torch.arange(tokens.shape[1]) + config.position_offset
        state = state + get(f"{room}.positions.weight")[places]
    if config.towers[name].hidden_size != state.shape[-1]:
        state = state @ get(f"embedding.{name}.projection.weight").T
    return state


def _read(
    config: ModelConfig, get: GetTensor, reader: str | None, states: dict[str, Tensor]
) -> Tensor:
    """All rows' logits, as the only hidden state gives them (None) or that of a tower."""
    room = "head" if reader is None else f"head.{reader}"
    table = reader if config.tables == "per_tower" else None
    tied = "embedding.tokens.weight" if table is None else f"embedding.{table}.tokens.weight"
    untied = "head.output.weight" if table is None else f"head.{table}.output.weight"
    rows = get(tied if config.tied else untied)
    if config.is_pair and config.head == "project":
        joined = torch.cat([states[IMAGE], states[TEXT]], dim=-1)
        hidden = joined @ get(f"{room}.projection.weight").T
        tower = config.towers[table] if table else config.table_tower(MAIN)
        return _norm(tower, get, f"{room}.norm", hidden) @ rows.T
    name = reader or MAIN
    hidden = _norm(config.towers[name], get, f"{room}.norm", states[name])
    if hidden.shape[-1] != rows.shape[-1]:
        hidden = hidden @ get(f"{room}.projection.weight").T
    return hidden @ rows.T


def _layer(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    inner = _norm(tower, get, f"{name}.attention_norm", x)
    q = _heads(tower, get, f"{name}.attention.q", inner)
    k = _heads(tower, get, f"{name}.attention.k", inner)
    v = _heads(tower, get, f"{name}.attention.v", inner)
    if tower.qk_norm:
        q = _head_norm(get, f"{name}.attention.q_norm", q)
        k = _head_norm(get, f"{name}.attention.k_norm", k)
    if tower.positions == "rope":
        q, k = _rotate(q, tower.rope_base), _rotate(k, tower.rope_base)
    # Query head n reads key and value head n // group.
    group = tower.num_heads // tower.kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    x = x + _linear(tower, get, f"{name}.attention.out", _attend(q, k, v))
    return x + _ffn(tower, get, name, x)


def _bridge(config: ModelConfig, get: GetTensor, name: str, x: Tensor, other: Tensor) -> Tensor:
    tower = config.towers[name.rsplit(".", 1)[1]]
    if config.bridges.kv_norm:
        other = _norm(tower, get, f"{name}.context_norm", other)
    q = _heads(tower, get, f"{name}.attention.q", _norm(tower, get, f"{name}.attention_norm", x))
    k = _heads(tower, get, f"{name}.attention.k", other)
    v = _heads(tower, get, f"{name}.attention.v", other)
    x = x + _linear(tower, get, f"{name}.attention.out", _attend(q, k, v))
    return x + _ffn(tower, get, name, x)


def _heads(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    """[B, S, d] -> [B, heads, S, head size]."""
    return _linear(tower, get, name, x).unflatten(-1, (-1, tower.head_size)).transpose(1, 2)


def _head_norm(get: GetTensor, name: str, x: Tensor) -> Tensor:
    weight, bias = (
        get(f"{name}.{kind}").view(x.shape[1], 1, x.shape[-1]) for kind in ("weight", "bias")
    )
    return _normalise(x - x.mean(dim=-1, keepdim=True), 1e-5) * weight + bias


def _rotate(x: Tensor, base: float) -> Tensor:
    """Element i and i + H/2 of a head are a complex number, turned by position * base^(-2i/H)."""
    half = x.shape[-1] // 2
    speed = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed
    turned = torch.complex(*(part.double() for part in x.split(half, dim=-1)))
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on heads [B, N, S, H] -> [B, S, N * H]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def _ffn(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    x = _norm(tower, get, f"{name}.ffn_norm", x)
    inner = _linear(tower, get, f"{name}.ffn.fc1", x)
    if tower.gated:
        inner = _activate(tower, _linear(tower, get, f"{name}.ffn.gate", x)) * inner
    else:
        inner = _activate(tower, inner)
    return _linear(tower, get, f"{name}.ffn.fc2", inner)


def _activate(tower: TowerConfig, x: Tensor) -> Tensor:
    if tower.activation == "relu":
        return x.clamp(min=0)
    return x * torch.sigmoid(x) if tower.activation == "silu" else F.gelu(x, approximate="tanh")


def _linear(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    y = x @ get(f"{name}.weight").T
    return y + get(f"{name}.bias") if tower.bias else y


def _norm(tower: TowerConfig, get: GetTensor, name: str, x: Tensor) -> Tensor:
    y = x.unflatten(-1, (tower.norm_groups, -1))
    y = y - y.mean(dim=-1, keepdim=True) if tower.norm == "layer" else y
    y = _normalise(y, tower.norm_epsilon).flatten(-2)
    if tower.affine_norm:
        y = y * get(f"{name}.weight")
    return y + get(f"{name}.bias") if tower.affine_norm and tower.norm == "layer" else y


def _normalise(x: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
