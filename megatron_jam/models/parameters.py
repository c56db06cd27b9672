"""The one table of a model's parameters: canonical name, shape, split, place and start.

Loading, export, initialisation, checkpoints and parity tests are loops over this table. Canonical
names are those of a weights folder: one tensor for each logical weight, never fused or sharded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_jam.config.model import ModelConfig, TowerConfig

Start = Literal["normal", "scaled", "position", "xavier", "zero", "one", "projection", "half"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One logical weight."""

    name: str
    """Canonical name."""

    shape: tuple[int, ...]
    """Full shape, without padding."""

    split: int | None = None
    """Dimension that tensor parallelism splits; None is replicated."""

    layer: int | None = None
    """Layer it belongs to; None stands outside the layers (embeddings, head)."""

    tower: str | None = None
    """Tower that it writes to, or None for what the towers share."""

    start: Start = "normal"
    """How a fresh model begins (facts: `weights/initial.py`)."""

    module: str
    """Parameter of JamModel that holds it."""

    part: tuple[int, int] = (0, 1)
    """It is part i of n of that parameter."""

    unit: int = 0
    """Rows of it that stand together there, followed by the next part's: those of a head or of a
    group of them; 0 for all of a rank's rows."""

    is_vocabulary: bool = False
    """Whether its rows are token ids, which tensor parallelism pads in memory."""


TOKENS, POSITIONS = "embedding.tokens.weight", "embedding.positions.weight"
PROJECTION, OUTPUT = "head.projection.weight", "head.output.weight"


def parameter_table(config: ModelConfig) -> list[Parameter]:
    """All parameters of a model, in the order of its forward pass."""
    table = list(_embedding(config))
    for layer in range(config.num_layers):
        for name in config.tower_names:
            table += _layer(config.towers[name], layer, name)
        for name in config.bridges_into(layer):
            table += _bridge(config, layer, name)
    return table + list(_head(config))


def _embedding(config: ModelConfig) -> Iterator[Parameter]:
    d, rows = config.hidden_size, config.max_positions + config.position_offset
    for tower in config.tower_names if config.separate else (None,):
        tokens, positions = (of_tower(name, tower) for name in (TOKENS, POSITIONS))
        size = (config.vocab_size, d)
        yield Parameter(
            name=tokens, shape=size, split=0, tower=tower, module=tokens, is_vocabulary=True
        )
        if config.towers[tower or config.tower_names[0]].positions == "learned":
            yield Parameter(
                name=positions, shape=(rows, d), start="position", tower=tower, module=positions
            )


def of_tower(name: str, tower: str | None) -> str:
    """Name of a tower's own copy of a shared table: embedding.tokens -> embedding.TOWER.tokens."""
    room, rest = name.split(".", 1)
    return name if tower is None else f"{room}.{tower}.{rest}"


def num_parameters(config: ModelConfig) -> int:
    """Exact number of weights of a model."""
    total = 0
    for parameter in parameter_table(config):
        size = 1
        for length in parameter.shape:
            size *= length
        total += size
    return total


def _layer(tower: TowerConfig, layer: int, name: str) -> Iterator[Parameter]:
    canonical, module = f"layers.{layer}.{name}", f"layers.{layer}.towers.{name}"
    place = {"layer": layer, "tower": name}
    yield from _norm(tower, f"{canonical}.attention_norm", f"{module}.input_layernorm", place)
    fused = f"{module}.self_attention.linear_qkv"
    for i, (kind, heads) in enumerate(_heads_of(tower)):
        held = {"module": fused, "split": 0, "part": (i, 3)}
        # Megatron lays out each group: its query heads, its key head, its value head.
        held["unit"] = heads // tower.kv_heads * tower.head_size
        shape = (heads * tower.head_size, tower.hidden_size)
        yield from _linear(tower, f"{canonical}.attention.{kind}", shape, held, place)
    if tower.qk_norm:
        yield from _head_norms(tower, canonical, f"{module}.self_attention", place)
    proj = f"{module}.self_attention.linear_proj"
    yield from _row(tower, f"{canonical}.attention.out", proj, tower.hidden_size, place)
    yield from _ffn(tower, canonical, module, place)


def _bridge(config: ModelConfig, layer: int, name: str) -> Iterator[Parameter]:
    """A bridge that writes to tower `name` and reads the other one."""
    tower = config.towers[name]
    canonical, module = f"bridges.{layer}.{name}", f"layers.{layer}.bridges.{name}"
    place = {"layer": layer, "tower": name}
    output: Start = "zero" if config.bridges.start == "zero" else "scaled"
    attention = f"{module}.cross_attention"
    yield from _norm(
        tower, f"{canonical}.attention_norm", f"{module}.pre_cross_attn_layernorm", place
    )
    if config.bridges.kv_norm:
        norm = f"layers.{layer}.context_norms.{name}"
        yield from _norm(tower, f"{canonical}.context_norm", norm, place)
    d = tower.hidden_size
    for kind, fused, part in (
        ("q", "linear_q", (0, 1)),
        ("k", "linear_kv", (0, 2)),
        ("v", "linear_kv", (1, 2)),
    ):
        held = {"module": f"{attention}.{fused}", "split": 0, "part": part}
        held["unit"] = tower.head_size
        yield from _linear(tower, f"{canonical}.attention.{kind}", (d, d), held, place, "xavier")
    proj = f"{attention}.linear_proj"
    yield from _row(tower, f"{canonical}.attention.out", proj, tower.hidden_size, place, output)
    yield from _ffn(tower, canonical, module, place, output)


def _ffn(
    tower: TowerConfig, canonical: str, module: str, place: dict, output: Start = "zero"
) -> Iterator[Parameter]:
    inner = tower.inner_size
    yield from _norm(tower, f"{canonical}.ffn_norm", f"{module}.pre_mlp_layernorm", place)
    names = ("gate", "fc1") if tower.gated else ("fc1",)
    for i, name in enumerate(names):
        held = {"module": f"{module}.mlp.linear_fc1", "split": 0, "part": (i, len(names))}
        shape = (inner, tower.hidden_size)
        yield from _linear(tower, f"{canonical}.ffn.{name}", shape, held, place)
    yield from _row(tower, f"{canonical}.ffn.fc2", f"{module}.mlp.linear_fc2", inner, place, output)


def _heads_of(tower: TowerConfig) -> list[tuple[str, int]]:
    """The projections of a self-attention, and the heads of each."""
    return [("q", tower.num_heads), ("k", tower.kv_heads), ("v", tower.kv_heads)]


def _head_norms(
    tower: TowerConfig, canonical: str, module: str, place: dict
) -> Iterator[Parameter]:
    """Chameleon's norms of queries and keys; each head has rows of its own."""
    for letter, heads in _heads_of(tower)[:2]:
        for kind, start in (("weight", "one"), ("bias", "zero")):
            yield Parameter(
                name=f"{canonical}.attention.{letter}_norm.{kind}",
                shape=(heads * tower.head_size,),
                split=0,
                start=start,
                module=f"{module}.norm_of_{letter}.{kind}",
                **place,
            )


def _row(
    tower: TowerConfig, name: str, module: str, inputs: int, place: dict, start: Start = "zero"
) -> Iterator[Parameter]:
    """A residual branch's output: columns are split, its bias is replicated."""
    shape = (tower.hidden_size, inputs)
    yield from _linear(tower, name, shape, {"module": module, "split": 1}, place, start)


def _linear(
    tower: TowerConfig,
    name: str,
    shape: tuple[int, int],
    held: dict,
    place: dict,
    start: Start = "normal",
) -> Iterator[Parameter]:
    weight = {**held, "module": f"{held['module']}.weight"}
    yield Parameter(name=f"{name}.weight", shape=shape, start=start, **weight, **place)
    if tower.bias:
        bias = {**held, "module": f"{held['module']}.bias"}
        bias["split"] = 0 if held["split"] == 0 else None
        yield Parameter(name=f"{name}.bias", shape=shape[:1], start="zero", **bias, **place)


def _norm(tower: TowerConfig, name: str, module: str, place: dict) -> Iterator[Parameter]:
    if tower.affine_norm:
        shape = (tower.hidden_size,)
        kinds: list[tuple[str, Start]] = [("weight", "one")]
        kinds += [("bias", "zero")] if tower.norm == "layer" else []
        for kind, start in kinds:
            yield Parameter(
                name=f"{name}.{kind}", shape=shape, start=start, module=f"{module}.{kind}", **place
            )


def _head(config: ModelConfig) -> Iterator[Parameter]:
    d, tied = config.hidden_size, config.tied
    if config.separate:
        for name, tower in config.towers.items():
            yield from _norm(tower, f"head.{name}.norm", f"head.norm.{name}", {"tower": name})
            yield from () if tied else _output(config, f"head.{name}.output", f"head.output.{name}")
        return
    if config.is_pair:
        start: Start = "half" if config.projection_start == "half" else "projection"
        yield Parameter(name=PROJECTION, shape=(d, 2 * d), start=start, module=PROJECTION)
    yield from _norm(config.towers[config.tower_names[0]], "head.norm", "head.norm", {})
    yield from () if tied else _output(config, "head.output", "head.output")


def _output(config: ModelConfig, name: str, module: str) -> Iterator[Parameter]:
    """Output rows that are not the token table's."""
    yield Parameter(
        name=f"{name}.weight",
        shape=(config.vocab_size, config.hidden_size),
        split=0,
        module=f"{module}.weight",
        is_vocabulary=True,
    )
