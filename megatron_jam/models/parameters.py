"""The one table of a model's parameters: canonical name, shape, split, place and start.

Loading, export, initialisation, checkpoints and parity tests are loops over this table. Canonical
names are those of a weights folder: one tensor for each logical weight, never fused or sharded.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_jam.config.model import MAIN, ModelConfig, TowerConfig

Start = Literal[
    "normal", "scaled", "position", "xavier", "zero", "one", "projection", "half", "eye"
]


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

    is_new: bool = False
    """Whether no parent has it: bridges and projections."""

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
"""Names where a model has one of each."""


def parameter_table(config: ModelConfig) -> list[Parameter]:
    """All parameters of a model, in the order of its forward pass."""
    table = list(_embedding(config))
    for layer in range(config.num_layers):
        for name in config.tower_names:
            own = config.tower_layer(name, layer)
            table += [] if own is None else _layer(config.towers[name], layer, own, name)
        for name in config.bridges_into(layer):
            table += _bridge(config, layer, name)
    return table + list(_head(config))


def _embedding(config: ModelConfig) -> Iterator[Parameter]:
    rows = config.max_positions + config.position_offset
    for table in config.table_names:
        tower, d = None if table == MAIN else table, config.table_width(table)
        yield Parameter(
            name=of_tower(TOKENS, tower),
            shape=(config.vocab_size, d),
            split=0,
            tower=tower,
            module=f"embedding.tables.{table}.tokens.weight",
            is_vocabulary=True,
        )
        if config.table_tower(table).positions == "learned":
            yield Parameter(
                name=of_tower(POSITIONS, tower),
                shape=(rows, d),
                start="position",
                tower=tower,
                module=f"embedding.tables.{table}.positions.weight",
            )
    for tower in config.projected_towers:
        yield Parameter(
            name=of_tower("embedding.projection.weight", tower),
            shape=(config.towers[tower].hidden_size, config.hidden_size),
            start="eye",
            tower=tower,
            is_new=True,
            module=f"embedding.projections.{tower}.weight",
        )


def of_tower(name: str, tower: str | None) -> str:
    """Name of what a tower has of its own: embedding.tokens -> embedding.TOWER.tokens."""
    room, rest = name.split(".", 1)
    return name if tower is None else f"{room}.{tower}.{rest}"


def padded_vocabulary(size: int, tensor: int) -> int:
    """Rows of the token table in memory: the smallest multiple of TP that holds `size`."""
    return math.ceil(size / tensor) * tensor


def learns(parameter: Parameter, frozen: Collection[str]) -> bool:
    """Whether training changes a weight where the parents' weights of towers `frozen` stay."""
    return parameter.is_new or parameter.tower not in frozen


def part_of_model(parameter: Parameter) -> str:
    """Which of `ModelConfig.parts` a weight belongs to."""
    room = parameter.name.split(".", 1)[0]
    if room == "layers":
        assert parameter.tower is not None
        return parameter.tower
    return "embeddings" if room == "embedding" else room


def num_parameters(config: ModelConfig) -> int:
    """Exact number of weights of a model."""
    return sum(math.prod(parameter.shape) for parameter in parameter_table(config))


def _layer(tower: TowerConfig, layer: int, own: int, name: str) -> Iterator[Parameter]:
    """A tower's layer number `own`, which is part of the model's layer `layer`."""
    canonical, module = f"layers.{own}.{name}", f"layers.{layer}.towers.{name}"
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
    place = {"layer": layer, "tower": name, "is_new": True}
    output: Start = "zero" if config.bridges.start == "zero" else "scaled"
    attention = f"{module}.cross_attention"
    yield from _norm(
        tower, f"{canonical}.attention_norm", f"{module}.pre_cross_attn_layernorm", place
    )
    d, other = tower.hidden_size, config.towers[config.other_tower(name)].hidden_size
    if config.bridges.kv_norm:
        norm = f"layers.{layer}.context_norms.{name}"
        yield from _norm(tower, f"{canonical}.context_norm", norm, place, other)
    for kind, fused, part, inputs in (
        ("q", "linear_q", (0, 1), d),
        ("k", "linear_kv", (0, 2), other),
        ("v", "linear_kv", (1, 2), other),
    ):
        held = {"module": f"{attention}.{fused}", "split": 0, "part": part}
        held["unit"] = tower.head_size
        shape = (d, inputs)
        yield from _linear(tower, f"{canonical}.attention.{kind}", shape, held, place, "xavier")
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


def _norm(
    tower: TowerConfig, name: str, module: str, place: dict, width: int = 0
) -> Iterator[Parameter]:
    if tower.affine_norm:
        shape = (width or tower.hidden_size,)
        kinds: list[tuple[str, Start]] = [("weight", "one")]
        kinds += [("bias", "zero")] if tower.norm == "layer" else []
        for kind, start in kinds:
            yield Parameter(
                name=f"{name}.{kind}", shape=shape, start=start, module=f"{module}.{kind}", **place
            )


def _head(config: ModelConfig) -> Iterator[Parameter]:
    projected = config.is_pair and config.head == "project"
    for reader in config.readers:
        tower = None if reader == MAIN else reader
        table = config.table_of(reader)
        module, place = f"head.readers.{reader}", {"tower": tower}
        width = config.table_width(table)
        start: Start = "eye"
        inputs = 0 if tower is None else config.towers[tower].hidden_size
        if projected:
            start = "half" if config.projection_start == "half" else "projection"
            inputs = config.joint_size
        if projected or inputs not in (0, width):
            name, shape = of_tower(PROJECTION, tower), (width, inputs)
            held = f"{module}.projection.weight"
            yield Parameter(name=name, shape=shape, start=start, module=held, is_new=True, **place)
        normed = config.table_tower(table if projected else reader)
        yield from _norm(normed, of_tower("head.norm", tower), f"{module}.norm", place)
    for table in () if config.tied else config.table_names:
        yield _output(config, table)


def _output(config: ModelConfig, table: str) -> Parameter:
    """Output rows that are not the token table's."""
    return Parameter(
        name=of_tower(OUTPUT, None if table == MAIN else table),
        shape=(config.vocab_size, config.table_width(table)),
        split=0,
        tower=None if table == MAIN else table,
        module=f"head.tables.{table}",
        is_vocabulary=True,
    )
