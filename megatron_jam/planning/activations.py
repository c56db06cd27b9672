"""What a tower's layer, a bridge and the head keep for the backward pass.

The steps are those that models/ runs with the `torch` backend on a CPU, without dropout; tests hold
them to measured peaks. Letters: d width, N query heads, K heads of keys and values, H head size.
"""

from collections.abc import Iterator
from typing import Literal

from megatron_jam.config.model import ModelConfig, TowerConfig
from megatron_jam.planning.steps import FP32, Sizes, Step

GENERATOR = 2 * 5056
"""Bytes of the random state that a part which is computed again keeps: the CPU's, twice."""

Recompute = Literal["none", "selective", "full"]


def joint_layer(
    model: ModelConfig, layer: int, sizes: Sizes, recompute: Recompute, names: dict[str, str]
) -> list[Step]:
    """Steps of the model's layer `layer`: towers, then bridges.

    `names` holds for each tower the name of the tensor with its states, and is moved on.
    """
    steps: list[Step] = []
    for tower in model.tower_names:
        if model.tower_layer(tower, layer) is not None:
            name = f"{layer} {tower}"
            steps += tower_layer(model.towers[tower], sizes, recompute, name, names[tower])
            names[tower] = f"{name} output"
    read = dict(names)
    for tower in model.bridges_into(layer):
        name = f"{layer} bridge {tower}"
        steps += bridge(
            model, tower, sizes, recompute, name, (read[tower], read[model.other_tower(tower)])
        )
        names[tower] = f"{name} output"
    return steps


def tower_layer(
    tower: TowerConfig, sizes: Sizes, recompute: Recompute, name: str, source: str
) -> list[Step]:
    """norm, self-attention, add; norm, FFN, add: on the states called `source`."""
    d, kv = tower.hidden_size, tower.kv_heads * tower.head_size
    steps = [*norm(tower, sizes, f"{name} norm", source, d)]
    steps.append(linear(sizes, {f"{name} normed": sizes.states(d)}, d, d * (d + 2 * kv)))
    fused, made = {f"{name} q k v": sizes.split(d + 2 * kv)}, d + kv
    # The backward pass puts the gradients of q, k and v together.
    steps.append(Step(keeps={}, gradient=sum(fused.values())))
    is_grouped = tower.kv_heads < tower.num_heads
    # Where query heads share keys and values, Megatron copies the queries out of the product.
    queries = {f"{name} q": sizes.split(d)} if is_grouped else fused
    inputs = queries | fused
    if tower.qk_norm:
        normed = {f"{name} heads normed": sizes.split(made)}
        scales = {f"{name} heads' statistics": 2 * sizes.split(tower.num_heads + tower.kv_heads)}
        steps.append(Step(keeps=inputs | normed | scales, gradient=sizes.split(made)))
    if tower.positions == "rope":
        # Cosines and sines, for q and for k.
        angles = {f"{name} angles": 4 * sizes.whole(tower.head_size)}
        steps.append(Step(keeps=angles, gradient=sizes.split(made), works=2 * sizes.split(d)))
    if tower.qk_norm or tower.positions == "rope":
        queries = {f"{name} q changed": sizes.split(d)}
        inputs = queries | fused | {f"{name} k changed": sizes.split(kv)}
    steps += attention(
        tower, sizes, recompute, name, inputs, repeated_for=queries if is_grouped else None
    )
    return [*steps, *ffn(tower, sizes, name)]


def bridge(
    model: ModelConfig,
    reader: str,
    sizes: Sizes,
    recompute: Recompute,
    name: str,
    sources: tuple[str, str],
) -> list[Step]:
    """norm, cross-attention to the other tower's states, add; norm, FFN, add."""
    tower, other = model.towers[reader], model.towers[model.other_tower(reader)].hidden_size
    d, (source, context) = tower.hidden_size, sources
    steps: list[Step] = []
    if model.bridges.kv_norm:
        steps += norm(tower, sizes, f"{name} context norm", context, other)
        context = f"{name} context normed"
    steps += norm(tower, sizes, f"{name} norm", source, d)
    # Keys and values of the other tower's states, then queries of the reader's own.
    steps.append(linear(sizes, {context: sizes.states(other)}, other, 2 * d * other))
    steps.append(linear(sizes, {f"{name} normed": sizes.states(d)}, d, d * d))
    inputs = {f"{name} q": sizes.split(d), f"{name} k v": sizes.split(2 * d)}
    steps += attention(tower, sizes, recompute, name, inputs)
    return [*steps, *ffn(tower, sizes, name)]


def norm(tower: TowerConfig, sizes: Sizes, name: str, source: str, width: int) -> list[Step]:
    """Where the residual forks off, and a norm of the tensor `source`."""
    states, scale = sizes.states(width), sizes.states(1)
    fork = Step(keeps={})
    if tower.norm == "layer":
        keeps = {source: states, f"{name} statistics": 2 * tower.norm_groups * scale}
        if tower.affine_norm and tower.norm_groups > 1:
            keeps[f"{name} before its weight"] = states
        return [fork, Step(keeps=keeps, gradient=states)]
    exact = states * FP32 // sizes.width
    # In bf16 torch's RMSNorm computes with an fp32 copy of its input, and keeps that one.
    keeps = {f"{name} input in fp32" if sizes.is_low else source: exact}
    keeps[f"{name} scale"] = tower.norm_groups * scale * FP32 // sizes.width
    if tower.affine_norm:
        keeps[f"{name} before its weight"] = exact
    return [fork, Step(keeps=keeps, gradient=exact, works=exact)]


def linear(sizes: Sizes, keeps: dict[str, int], inputs: int, weight: int) -> Step:
    """A column-parallel linear layer of `inputs` columns; it keeps its input."""
    return Step(keeps=keeps, gradient=sizes.whole(inputs), weight=weight // sizes.tensor)


def attention(
    tower: TowerConfig,
    sizes: Sizes,
    recompute: Recompute,
    name: str,
    inputs: dict[str, int],
    repeated_for: dict[str, int] | None = None,
) -> Iterator[Step]:
    """Scores and values, then the output projection; the former in fp32, as on a CPU.

    `inputs` are the tensors with queries, keys and values; keys and values are repeated where query
    heads share them, for the queries in `repeated_for`.
    """
    d = tower.hidden_size
    heads = sizes.split(d, FP32)
    if sizes.is_low:
        read = {f"{name} q k v in fp32": 3 * heads}
    elif repeated_for is not None:
        read = repeated_for | {f"{name} k v repeated": 2 * heads}
    else:
        read = inputs
    out = {f"{name} attended": heads, f"{name} sums": sizes.split(tower.num_heads, FP32)}
    # Gradients of q, k and v; of what the kernel gave, where that was cast to bf16.
    works = heads if sizes.is_low else 0
    if recompute == "selective":
        again = {key: size for key, size in (read | out).items() if key not in inputs}
        works += sum(again.values()) + (sizes.split(d) if sizes.is_low else 0)
        keeps = inputs | {f"{name} generator": GENERATOR}
    else:
        keeps = read | out
    yield Step(keeps=keeps, gradient=3 * heads, works=works)
    attended = f"{name} attended in bf16" if sizes.is_low else f"{name} attended"
    size = sizes.split(d)
    yield Step(keeps={attended: size}, gradient=size, weight=d * d // sizes.tensor)


def ffn(tower: TowerConfig, sizes: Sizes, name: str) -> list[Step]:
    """norm, fc1, activation, fc2."""
    d, f = tower.hidden_size, tower.inner_size
    inner = sizes.split(f)
    steps = norm(tower, sizes, f"{name} FFN norm", f"{name} middle", d)
    normed = {f"{name} FFN normed": sizes.states(d)}
    steps.append(linear(sizes, normed, d, (2 if tower.gated else 1) * d * f))
    # ReLU keeps what it gave, the others what they were given (gates and values in one tensor).
    active = {f"{name} active": inner}
    is_relu = tower.activation == "relu"
    before = active if is_relu else {f"{name} fc1": inner * (2 if tower.gated else 1)}
    if tower.gated:
        steps.append(Step(keeps=before, gradient=2 * inner))
        steps.append(Step(keeps=active | {f"{name} values": inner}, gradient=2 * inner))
        active = {f"{name} product": inner}
    else:
        steps.append(Step(keeps=before, gradient=inner))
    steps.append(Step(keeps=active, gradient=inner, weight=d * f // sizes.tensor))
    return steps
