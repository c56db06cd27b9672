"""The typed description of a model: towers, bridges, head; a weights folder's config.json."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_jam.config.checks import check_types
from megatron_jam.config.errors import UsageError

MAIN, IMAGE, TEXT = "main", "image", "text"
PAIR = (IMAGE, TEXT)
"""The order of the two towers wherever their states or names stand side by side."""

_MOST_LAYERS = 10_000
"""Far more than any model has. The table of parameters has lines for each: 10^9 of them, a slip of
the pen or a damaged file, would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A decoder-only transformer: pre-norm layers of causal self-attention and an FFN.

    The defaults are CM3leon's. OPT has `bias` and `affine_norm`; Llama `affine_norm`, norm rms,
    positions rope, activation silu, `gated` and often `num_kv_heads`; Chameleon besides `qk_norm`.
    """

    num_layers: int
    """Layers."""

    hidden_size: int
    """Width d of the residual stream."""

    num_heads: int
    """Attention heads; d / heads is the head size."""

    num_kv_heads: int = 0
    """Heads of keys and values, each read by num_heads / num_kv_heads query heads (grouped
    queries); 0 means num_heads."""

    ffn_size: int = 0
    """Inner width of the FFN; 0 means 4 d."""

    activation: Literal["relu", "gelu", "silu"] = "relu"
    """FFN activation; gelu is the tanh form."""

    gated: bool = False
    """Whether the FFN is fc2(activation(gate(x)) * fc1(x)), SwiGLU with silu, and not
    fc2(activation(fc1(x)))."""

    bias: bool = False
    """Biases in all linear layers."""

    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm, which neither centres nor shifts."""

    affine_norm: bool = False
    """Learnable scale in the norms, and shift in LayerNorms."""

    norm_epsilon: float = 1e-5
    """Added to the variance (rms: mean square) in norms."""

    norm_groups: int = 1
    """Equal parts of the width that norms treat each by itself; 2 keeps the halves of a diagonal
    JAM-Width apart."""

    qk_norm: bool = False
    """LayerNorm over each head's query and key before the rotation, scale and shift of each head's
    own (Chameleon)."""

    positions: Literal["learned", "rope"] = "learned"
    """A learned row is added to each token, or queries and keys are rotated (RoPE, halves)."""

    rope_base: float = 10000.0
    """RoPE's base: pair i of a head of size H turns by base^(-2i/H) radians a position."""

    def __post_init__(self) -> None:
        check_types(self, "tower ")
        for name in ("num_layers", "hidden_size", "num_heads"):
            if getattr(self, name) < 1:
                raise UsageError(f"tower {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_layers > _MOST_LAYERS:
            raise UsageError(
                f"tower num_layers is {self.num_layers}; it must be {_MOST_LAYERS:,} or less"
            )
        if self.hidden_size % self.num_heads:
            raise UsageError(
                f"tower num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
            raise UsageError(
                f"tower num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise UsageError(
                f"tower head size {self.head_size} (hidden_size / num_heads) is odd; RoPE turns"
                " pairs: choose an even one"
            )
        if self.norm_groups < 1 or self.hidden_size % self.norm_groups:
            raise UsageError(
                f"tower norm_groups {self.norm_groups} does not divide hidden_size"
                f" {self.hidden_size}"
            )
        if self.ffn_size < 0:
            raise UsageError(f"tower ffn_size is {self.ffn_size}; it must be 0 (4 d) or more")
        if not self.norm_epsilon > 0:
            raise UsageError(f"tower norm_epsilon is {self.norm_epsilon}; it must be above 0")
        if not self.rope_base > 0:
            raise UsageError(f"tower rope_base is {self.rope_base}; it must be above 0")

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def inner_size(self) -> int:
        """Inner width of the FFN."""
        return self.ffn_size or 4 * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Bidirectional cross-attention blocks between two towers (paper section 2.1.3)."""

    every: int = 2
    """A bridge follows layer l where l % every == 0; 0 means no bridges (paper table 4)."""

    layers: list[int] = field(default_factory=list)
    """Layers, counted from 0, that a bridge follows, in place of `every`; none means `every`."""

    into: Literal["both", "image", "text"] = "both"
    """Which tower the bridges write to."""

    kv_norm: bool = False
    """A norm also on the states that keys and values are made of; the authors' code has one for
    the reader's alone."""

    start: Literal["random", "zero"] = "random"
    """How new bridges begin: `random` as the authors' code, `zero` adds nothing at step 0."""

    def __post_init__(self) -> None:
        check_types(self, "bridges.")
        if self.every < 0:
            raise UsageError(f"bridges.every is {self.every}; it must be 0 (none) or more")
        check_layers(self.layers, "bridges.layers")


def check_layers(layers: object, setting: str) -> None:
    """Raise UsageError unless `layers` are rising whole numbers from 0 on."""
    numbers = layers if isinstance(layers, list) else [None]
    if not all(type(n) is int and n >= 0 for n in numbers) or sorted(set(numbers)) != numbers:
        raise UsageError(f"{setting} is {layers!r}; give a list of layers from 0 on, rising")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of one tower (a parent, JAM-Uniform, JAM-Width) or of two (JAM-Cross)."""

    towers: dict[str, TowerConfig]
    """`{main: ...}`, or `{image: ..., text: ...}`."""

    vocab_size: int
    """True number of token ids; padding to a multiple of TP exists in memory only."""

    max_positions: int
    """Longest sequence."""

    position_offset: int = 2
    """Unused rows in front of the position table (OPT's convention)."""

    tied: bool = True
    """Whether output rows are the token table's; False gives the head rows of its own."""

    tables: Literal["shared", "per_tower"] = "shared"
    """Whether two towers share one token table and one position table (the authors' code) or keep
    their own. A shared table is as wide as the wider tower; the other reads a projection of it."""

    head: Literal["project", "wide"] = "project"
    """How two towers' states become logits: `project`, norm(Linear([image ; text])) for all rows
    (the authors' code), or `wide`, each tower's own norm, rows of text ids reading the text tower
    and all other rows the image tower. With per-tower tables, the wide head and zero bridges a
    model begins with exactly its parents' logits."""

    text_ids: list[int] = field(default_factory=lambda: [0, 0])
    """First text id and how many there are, which per-tower tables and the wide head need."""

    alignment: list[int] = field(default_factory=list)
    """For towers of unlike depth: which layer of the deeper one (from 0) each layer of the other
    stands beside; none spreads them evenly."""

    init_std: float = 0.006
    """Standard deviation of fresh weights (CM3leon), cut at 3 sigma."""

    bridges: BridgeConfig = field(default_factory=BridgeConfig)
    """Bridges between two towers; ignored for one."""

    projection_start: Literal["random", "half"] = "random"
    """How the projecting head's [image ; text] -> d begins: N(0, 1/sqrt(d)) as the authors' code,
    or [I/2, I/2], which keeps the parents' output map."""

    def __post_init__(self) -> None:
        check_types(self)
        if set(self.towers) not in ({MAIN}, set(PAIR)):
            raise UsageError(
                f"towers are {sorted(self.towers)}; give either `{MAIN}` or `{IMAGE}` and `{TEXT}`"
            )
        for name in ("vocab_size", "max_positions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.position_offset < 0:
            raise UsageError(f"position_offset is {self.position_offset}; it must be 0 or more")
        if not self.init_std > 0:
            raise UsageError(f"init_std is {self.init_std}; it must be above 0")
        if self.is_pair:
            self._check_pair()
        elif self.tables != "shared" or self.head != "project" or self.alignment:
            raise UsageError("tables, head and alignment are for towers image and text")
        if self.projection_start == "half" and not (self.is_pair and self.head == "project"):
            raise UsageError("projection_start: half is for the projecting head of two towers")

    def _check_pair(self) -> None:
        image, text = self.towers[IMAGE], self.towers[TEXT]
        if image.positions != text.positions and self.tables == "shared":
            raise UsageError("towers image and text differ in positions; set tables: per_tower")
        if max(self.bridges.layers, default=0) >= self.num_layers:
            raise UsageError(
                f"bridges.layers is {self.bridges.layers}, but the towers have layers 0 to"
                f" {self.num_layers - 1}"
            )
        for tower, other in ((image, text), (text, image)):
            if self.bridges.kv_norm and other.hidden_size % tower.norm_groups:
                raise UsageError(
                    f"bridges.kv_norm: norm_groups {tower.norm_groups} of one tower does not divide"
                    f" hidden_size {other.hidden_size} of the other, which its bridges read"
                )
        if self.readers == PAIR and not self._has_text_ids():
            raise UsageError(
                "tables: per_tower and head: wide need text_ids: [first, count] within vocab_size"
                f" {self.vocab_size}, not {self.text_ids!r}"
            )
        if self.alignment:
            check_layers(self.alignment, "alignment")
            depth = min(image.num_layers, text.num_layers)
            if image.num_layers == text.num_layers:
                raise UsageError("alignment is for towers of unlike depth; leave it out")
            if len(self.alignment) != depth or self.alignment[-1] >= self.num_layers:
                raise UsageError(
                    f"alignment is {self.alignment}; give {depth} layers of 0 to"
                    f" {self.num_layers - 1}, one for each layer of the shallower tower"
                )

    def _has_text_ids(self) -> bool:
        ids = self.text_ids
        if not isinstance(ids, list) or [type(each) for each in ids] != [int, int]:
            return False
        return ids[0] >= 0 and ids[1] > 0 and sum(ids) <= self.vocab_size

    @property
    def is_pair(self) -> bool:
        """Whether the model has two towers (JAM-Cross)."""
        return MAIN not in self.towers

    @property
    def tower_names(self) -> tuple[str, ...]:
        """Names of the towers, in the order of their states."""
        return PAIR if self.is_pair else (MAIN,)

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that gradients and learning rates are told apart by: towers' layers, bridges,
        embeddings, head."""
        bridges = ("bridges",) if any(map(self.bridges_into, range(self.num_layers))) else ()
        return (*self.tower_names, *bridges, "embeddings", "head")

    @property
    def num_layers(self) -> int:
        """Layers of the deeper tower."""
        return max(tower.num_layers for tower in self.towers.values())

    @property
    def hidden_size(self) -> int:
        """Width of the wider tower, and of a shared token table."""
        return max(tower.hidden_size for tower in self.towers.values())

    @property
    def table_names(self) -> tuple[str, ...]:
        """Token tables: one, `main`, or each tower's."""
        return PAIR if self.is_pair and self.tables == "per_tower" else (MAIN,)

    def table_width(self, table: str) -> int:
        """Width of a token table."""
        return self.hidden_size if table == MAIN else self.towers[table].hidden_size

    def table_tower(self, table: str) -> TowerConfig:
        """The tower whose kind of positions and norm go with a table; for a shared one the first
        of the wider."""
        if table != MAIN:
            return self.towers[table]
        towers = (self.towers[name] for name in self.tower_names)
        return next(tower for tower in towers if tower.hidden_size == self.hidden_size)

    @property
    def projected_towers(self) -> tuple[str, ...]:
        """Towers that are narrower than the shared table that they read."""
        if self.tables == "per_tower":
            return ()
        return tuple(n for n in self.tower_names if self.towers[n].hidden_size < self.hidden_size)

    @property
    def readers(self) -> tuple[str, ...]:
        """What the head makes logits of: one hidden state, `main`, for all rows, or one for the
        rows of each tower."""
        shared = self.tables == "shared" and self.head == "project"
        return PAIR if self.is_pair and not shared else (MAIN,)

    def table_of(self, reader: str) -> str:
        """The token table whose rows a reader's state is multiplied with, if they are tied."""
        return reader if reader in self.table_names else MAIN

    def other_tower(self, name: str) -> str:
        """The tower that a bridge into tower `name` reads."""
        return TEXT if name == IMAGE else IMAGE

    def tower_layer(self, tower: str, layer: int) -> int | None:
        """Which of a tower's layers (from 0) is part of the model's layer `layer`, or None."""
        depth = self.towers[tower].num_layers
        if depth == self.num_layers:
            return layer
        places = self.alignment or [i * self.num_layers // depth for i in range(depth)]
        return places.index(layer) if layer in places else None

    @property
    def joint_size(self) -> int:
        """Width of what crosses a pipeline boundary: the towers' widths added up."""
        return sum(tower.hidden_size for tower in self.towers.values())

    def bridges_into(self, layer: int) -> tuple[str, ...]:
        """Towers that a bridge behind `layer` (counted from 0) writes to."""
        bridges = self.bridges
        by_rule = bridges.every > 0 and layer % bridges.every == 0
        if not self.is_pair or not (layer in bridges.layers if bridges.layers else by_rule):
            return ()
        return PAIR if bridges.into == "both" else (bridges.into,)

    def save(self, path: Path) -> None:
        """Write JSON to `path`."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Build from plain dictionaries; an unknown key is a UsageError."""
        values = dict(values)
        towers = values.pop("towers", {})
        if not isinstance(towers, dict):
            raise UsageError(f"towers is {towers!r}; it must hold settings for each tower's name")
        towers = {name: _build(TowerConfig, value) for name, value in towers.items()}
        bridges = _build(BridgeConfig, values.pop("bridges", {}))
        return _build(cls, {**values, "towers": towers, "bridges": bridges})


def _build(cls: type, values: dict):  # type: ignore[no-untyped-def]
    if not isinstance(values, dict):
        raise UsageError(f"{cls.__name__} is {values!r}; it must be a list of `name: value`")
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UsageError(f"unknown key `{name}` in {cls.__name__}; known: {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{cls.__name__}: {error}") from error
