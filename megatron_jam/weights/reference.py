"""Any model of this project in plain torch, layer by layer: the specification of models/.

It shares no code with models/ and imports torch alone, so that exported models carry this very
file. It needs a model's settings, as config.json has them, and a way to get tensors by canonical
name, so it never holds more than one layer. Letters: B batch, S tokens, P tokens with those read
before, d width, N heads, H width of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

GetTensor = Callable[[str], Tensor]
Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MAIN, IMAGE, TEXT = "main", "image", "text"


@dataclass(frozen=True, kw_only=True)
class _Context:
    """Where tokens stand, and what they may read."""

    positions: Tensor
    """int64 [B or 1, S], from 0."""

    hidden: Tensor
    """Which tokens a token does not see: bool [B or 1, 1, S, P]."""

    keep: Keep
    """Takes an attention's keys and values [B, N, S, H] of these tokens, gives those of all
    [B, N, P, H]."""


def reference_logits(
    config: Any,
    get: GetTensor,
    tokens: Tensor,
    *,
    cache: Any = None,
    mask: Tensor | None = None,
    last: int = 0,
) -> Tensor:
    """Logits [B, S, V] of `tokens` int64 [B, S], in the dtype of the tensors that `get` returns.

    Args:
        config: what config.json says, as attributes.
        get: gives a tensor by its canonical name.
        tokens: ids; with a cache those that it has not seen.
        cache: keeps keys and values of earlier tokens, with transformers' `get_seq_length()` and
            `update(keys, values, number)`; it is given each attention's under its number.
        mask: [B, P], 0 for tokens that are padding, those in `cache` included.
        last: of so many tokens at the end alone; 0 means of all.
    """
    context = _context(tokens, cache, mask)
    towers = {name: config.towers[name] for name in (MAIN, IMAGE, TEXT) if name in config.towers}
    states = {name: _embed(config, get, name, tokens, context) for name in towers}
    for layer in range(_depth(config)):
        for name, tower in towers.items():
            own = _own_layer(config, tower, layer)
            if own is not None:
                room = f"layers.{own}.{name}"
                states[name] = _layer(tower, get, room, states[name], context)
        before = dict(states)  # both directions read the states from before either update
        for name in _bridges_into(config, layer):
            room, other = f"bridges.{layer}.{name}", before[TEXT if name == IMAGE else IMAGE]
            states[name] = _bridge(config, get, room, before[name], other, context)
    states = {name: state[:, -last:] for name, state in states.items()}
    if not _is_pair(config) or (config.tables == "shared" and config.head == "project"):
        return _read(config, get, None, states)
    # Rows of text ids read the text tower, all others the image tower.
    logits = _read(config, get, IMAGE, states)
    rows = slice(config.text_ids[0], sum(config.text_ids))
    logits[..., rows] = _read(config, get, TEXT, states)[..., rows]
    return logits


def num_attentions(config: Any) -> int:
    """How many attentions keep keys and values: one for each tower's layer and each bridge."""
    bridges = sum(len(_bridges_into(config, layer)) for layer in range(_depth(config)))
    return sum(tower.num_layers for tower in config.towers.values()) + bridges


def _context(tokens: Tensor, cache: Any, mask: Tensor | None) -> _Context:
    device, start = tokens.device, cache.get_seq_length() if cache is not None else 0
    places = torch.arange(start + tokens.shape[1], device=device)
    hidden = (places > places[start:, None])[None, None]
    positions = places[None, start:]
    if mask is not None:
        # Padding sees itself, so that no row of attention is empty.
        itself = places == places[start:, None]
        hidden = hidden | ((mask == 0)[:, None, None] & ~itself)
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]
    numbers = count()

    def keep(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (keys, values) if cache is None else cache.update(keys, values, next(numbers))

    return _Context(positions=positions, hidden=hidden, keep=keep)


def _is_pair(config: Any) -> bool:
    return MAIN not in config.towers


def _depth(config: Any) -> int:
    return max(tower.num_layers for tower in config.towers.values())


def _width(config: Any) -> int:
    return max(tower.hidden_size for tower in config.towers.values())


def _own_layer(config: Any, tower: Any, layer: int) -> int | None:
    """The tower's layer in the model's `layer`; the shallower tower has none in some."""
    whole, own = _depth(config), tower.num_layers
    if own == whole:
        return layer
    places = config.alignment or [number * whole // own for number in range(own)]
    return places.index(layer) if layer in places else None


def _bridges_into(config: Any, layer: int) -> list[str]:
    """Towers that a bridge behind `layer` writes to."""
    bridges = config.bridges
    due = bridges.every > 0 and layer % bridges.every == 0
    if not _is_pair(config) or not (layer in bridges.layers if bridges.layers else due):
        return []
    return [IMAGE, TEXT] if bridges.into == "both" else [bridges.into]


def _embed(config: Any, get: GetTensor, name: str, tokens: Tensor, context: _Context) -> Tensor:
    is_own = _is_pair(config) and config.tables == "per_tower"
    room = f"embedding.{name}" if is_own else "embedding"
    state = get(f"{room}.tokens.weight")[tokens]
    if config.towers[name].positions == "learned":
        rows = context.positions + config.position_offset
        table = get(f"{room}.positions.weight")
        if int(context.positions.max()) >= config.max_positions:
            raise ValueError(f"the model has {config.max_positions} positions; give fewer tokens")
        state = state + table[rows]
    if config.towers[name].hidden_size != state.shape[-1]:
        state = state @ get(f"embedding.{name}.projection.weight").T
    return state


def _read(config: Any, get: GetTensor, reader: str | None, states: dict[str, Tensor]) -> Tensor:
    """All rows' logits, as the only hidden state gives them (None) or that of a tower."""
    room = "head" if reader is None else f"head.{reader}"
    table = reader if config.tables == "per_tower" else None
    tied = "embedding.tokens.weight" if table is None else f"embedding.{table}.tokens.weight"
    untied = "head.output.weight" if table is None else f"head.{table}.output.weight"
    rows = get(tied if config.tied else untied)
    if _is_pair(config) and config.head == "project":
        joined = torch.cat([states[IMAGE], states[TEXT]], dim=-1)
        hidden = joined @ get(f"{room}.projection.weight").T
        # A shared table's norm is of the first of the wider towers.
        wide = next(n for n in (IMAGE, TEXT) if config.towers[n].hidden_size == _width(config))
        return _norm(config.towers[table or wide], get, f"{room}.norm", hidden) @ rows.T
    name = reader or MAIN
    hidden = _norm(config.towers[name], get, f"{room}.norm", states[name])
    if hidden.shape[-1] != rows.shape[-1]:
        hidden = hidden @ get(f"{room}.projection.weight").T
    return hidden @ rows.T


def _layer(tower: Any, get: GetTensor, name: str, x: Tensor, context: _Context) -> Tensor:
    inner = _norm(tower, get, f"{name}.attention_norm", x)
    q = _heads(tower, get, f"{name}.attention.q", inner)
    k = _heads(tower, get, f"{name}.attention.k", inner)
    v = _heads(tower, get, f"{name}.attention.v", inner)
    if tower.qk_norm:
        q = _head_norm(get, f"{name}.attention.q_norm", q)
        k = _head_norm(get, f"{name}.attention.k_norm", k)
    if tower.positions == "rope":
        q, k = (_rotate(each, context.positions, tower.rope_base) for each in (q, k))
    x = x + _linear(tower, get, f"{name}.attention.out", _attend(q, k, v, context))
    return x + _ffn(tower, get, name, x)


def _bridge(
    config: Any, get: GetTensor, name: str, x: Tensor, other: Tensor, context: _Context
) -> Tensor:
    tower = config.towers[name.rsplit(".", 1)[1]]
    if config.bridges.kv_norm:
        other = _norm(tower, get, f"{name}.context_norm", other)
    q = _heads(tower, get, f"{name}.attention.q", _norm(tower, get, f"{name}.attention_norm", x))
    k = _heads(tower, get, f"{name}.attention.k", other)
    v = _heads(tower, get, f"{name}.attention.v", other)
    x = x + _linear(tower, get, f"{name}.attention.out", _attend(q, k, v, context))
    return x + _ffn(tower, get, name, x)


def _heads(tower: Any, get: GetTensor, name: str, x: Tensor) -> Tensor:
    """[B, S, d] -> [B, N, S, H]."""
    size = tower.hidden_size // tower.num_heads
    return _linear(tower, get, name, x).unflatten(-1, (-1, size)).transpose(1, 2)


def _head_norm(get: GetTensor, name: str, x: Tensor) -> Tensor:
    weight, bias = (
        get(f"{name}.{kind}").view(x.shape[1], 1, x.shape[-1]) for kind in ("weight", "bias")
    )
    y = _wide(x)
    y = _normalise(y - y.mean(dim=-1, keepdim=True), 1e-5)
    return (y * weight + bias).to(x.dtype)


def _rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Element i and i + H/2 of a head are a complex number, turned by position * base^(-2i/H)."""
    half = x.shape[-1] // 2
    speed = base ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = positions[:, None, :, None] * speed
    turned = torch.complex(*(part.double() for part in x.split(half, dim=-1)))
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, context: _Context) -> Tensor:
    """Causal attention on heads [B, N, S, H] -> [B, S, N * H]."""
    k, v = context.keep(k, v)
    # Query head n reads key and value head n // group.
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    # Divided first: a product of 16 bits would overflow.
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)
    weights = scores.masked_fill(context.hidden, -math.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def _ffn(tower: Any, get: GetTensor, name: str, x: Tensor) -> Tensor:
    x = _norm(tower, get, f"{name}.ffn_norm", x)
    inner = _linear(tower, get, f"{name}.ffn.fc1", x)
    if tower.gated:
        inner = _activate(tower, _linear(tower, get, f"{name}.ffn.gate", x)) * inner
    else:
        inner = _activate(tower, inner)
    return _linear(tower, get, f"{name}.ffn.fc2", inner)


def _activate(tower: Any, x: Tensor) -> Tensor:
    if tower.activation == "relu":
        return x.clamp(min=0)
    return x * torch.sigmoid(x) if tower.activation == "silu" else F.gelu(x, approximate="tanh")


def _linear(tower: Any, get: GetTensor, name: str, x: Tensor) -> Tensor:
    y = x @ get(f"{name}.weight").T
    return y + get(f"{name}.bias") if tower.bias else y


def _norm(tower: Any, get: GetTensor, name: str, x: Tensor) -> Tensor:
    y = _wide(x).unflatten(-1, (tower.norm_groups, -1))
    y = y - y.mean(dim=-1, keepdim=True) if tower.norm == "layer" else y
    y = _normalise(y, tower.norm_epsilon).flatten(-2)
    if tower.affine_norm:
        y = y * get(f"{name}.weight")
    if tower.affine_norm and tower.norm == "layer":
        y = y + get(f"{name}.bias")
    return y.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: in fp16 the square of 256 is infinite."""
    return x.float() if x.element_size() == 2 else x


def _normalise(x: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)
