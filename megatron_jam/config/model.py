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

    separate: bool = False
    """Two towers with token tables, positions and outputs of their own, and no projection: rows of
    text ids read the text tower, all other rows the image tower. With zero bridges such a model
    begins with exactly its parents' logits. False is the authors' code: one of each."""

    text_ids: list[int] = field(default_factory=lambda: [0, 0])
    """First text id and how many there are, which `separate` needs."""

    init_std: float = 0.006
    """Standard deviation of fresh weights (CM3leon), cut at 3 sigma."""

    bridges: BridgeConfig = field(default_factory=BridgeConfig)
    """Bridges between two towers; ignored for one."""

    projection_start: Literal["random", "half"] = "random"
    """How JAM-Cross's [image ; text] -> d projection begins: N(0, 1/sqrt(d)) as the authors' code,
    or [I/2, I/2], which keeps the parents' output map."""

    def __post_init__(self) -> None:
        check_types(self)
        if set(self.towers) not in ({MAIN}, set(PAIR)):
            raise UsageError(
                f"towers are {sorted(self.towers)}; give either `{MAIN}` or `{IMAGE}` and `{TEXT}`"
            )
        if self.is_pair:
            image, text = self.towers[IMAGE], self.towers[TEXT]
            for name in ("num_layers", "hidden_size"):
                if getattr(image, name) != getattr(text, name):
                    raise UsageError(f"towers image and text differ in {name}")
            if image.positions != text.positions and not self.separate:
                raise UsageError("towers image and text differ in positions; set separate: true")
            if max(self.bridges.layers, default=0) >= self.num_layers:
                raise UsageError(
                    f"bridges.layers is {self.bridges.layers}, but the towers have layers 0 to"
                    f" {self.num_layers - 1}"
                )
        for name in ("vocab_size", "max_positions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.separate and not (self.is_pair and len(self.text_ids) == 2 and self.text_ids[1]):
            raise UsageError("separate needs towers image and text, and text_ids: [first, count]")
        if self.position_offset < 0:
            raise UsageError(f"position_offset is {self.position_offset}; it must be 0 or more")
        if not self.init_std > 0:
            raise UsageError(f"init_std is {self.init_std}; it must be above 0")

    @property
    def is_pair(self) -> bool:
        """Whether the model has two towers (JAM-Cross)."""
        return MAIN not in self.towers

    @property
    def tower_names(self) -> tuple[str, ...]:
        """Names of the towers, in the order of their states."""
        return PAIR if self.is_pair else (MAIN,)

    @property
    def num_layers(self) -> int:
        """Layers of each tower."""
        return next(iter(self.towers.values())).num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the embedding and of the head, d."""
        return next(iter(self.towers.values())).hidden_size

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
