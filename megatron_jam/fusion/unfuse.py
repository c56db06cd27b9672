"""The way back: one parent out of a JAM-Cross or a JAM-Width.

What fusion kept apart comes back bit for bit: towers, per-tower tables, the wide head's norms, the
halves of a width. What the towers share (a token table, the projecting head's norm) comes back as
the child has it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_not_read
from megatron_jam.config.log import logger
from megatron_jam.config.model import MAIN, PAIR, TEXT, BridgeConfig, ModelConfig
from megatron_jam.models.parameters import (
    OUTPUT,
    POSITIONS,
    TOKENS,
    num_parameters,
    of_tower,
    parameter_table,
)
from megatron_jam.weights.folder import FolderWriter, WeightsFolder


def unfuse(weights: Path, tower: str, output: Path) -> ModelConfig:
    """Write a parent of a fused model as a weights folder; return its description.

    Args:
        weights: weights folder of a JAM-Cross, or of a JAM-Width from `tools/fuse.py`.
        tower: `text` or `image`.
        output: folder to write.

    Raises:
        UsageError: the model has no such parent to give back.
    """
    child = WeightsFolder(weights)
    if tower not in PAIR:
        raise UsageError(f"tower is {tower!r}; choose one of image, text")
    check_not_read(output, child.path)
    recipe = child.provenance.get("recipe", {})
    if not child.config.is_pair and recipe.get("method") != "width":
        raise UsageError(f"{weights} is neither a JAM-Cross nor a JAM-Width of tools/fuse.py")
    part = _tower if child.config.is_pair else _half
    config = (_tower_config if child.config.is_pair else _half_config)(child.config, tower)
    table = parameter_table(config)
    shapes = {entry.name: entry.shape for entry in table}
    dtype = child.read(child.names[0], 0, 0, 1).dtype
    with FolderWriter(
        output, config=config, source=child.path, shapes=shapes, dtype=dtype
    ) as writer:
        for entry in table:
            writer.write(entry.name, part(child, entry.name, tower))
        child.unchanged.check()
        origin = _origin(child, tower)
        is_parent = _is_the_parent(writer.complete(origin), child, tower)
        writer.finish({**origin, "certificate": {"is_the_parent": is_parent}})
    logger.info("wrote %s: %s parameters", output, f"{num_parameters(config):,}")
    logger.info("certificate: %s", _TOLD[is_parent])
    return config


_TOLD = {
    True: "bit for bit the parent that was fused",
    False: "not bit for bit the parent that was fused: what the model shares between its parents, "
    "and its dtype, stay",
    None: "not compared: the model's provenance.json does not say what its parents were",
}


def _is_the_parent(found: WeightsFolder, child: WeightsFolder, tower: str) -> bool | None:
    """Whether all tensors have the bytes that the parent's had; None if nobody wrote them down."""
    due = child.provenance.get("parents", {}).get(tower, {}).get("sha256")
    return None if due is None else found.sha256 == due


def _origin(child: WeightsFolder, tower: str) -> dict[str, Any]:
    return {
        "made_by": "tools/unfuse.py",
        "tower": tower,
        "image_tokenizer_sha256": child.image_tokenizer_sha256,
        "parents": {"fused": {"folder": str(child.path), "sha256": child.sha256}},
    }


def _tower_config(child: ModelConfig, tower: str) -> ModelConfig:
    return dataclasses.replace(
        child,
        towers={MAIN: child.towers[tower]},
        tables="shared",
        head="project",
        alignment=[],
        bridges=BridgeConfig(),
        projection_start="random",
    )


def _tower(child: WeightsFolder, name: str, tower: str) -> Tensor:
    """A parent's tensor `name` in a JAM-Cross; of a wider shared table its first columns."""
    config = child.config
    if name.startswith("layers."):
        return child.read(name.replace(f".{MAIN}.", f".{tower}."))
    own = of_tower(name, tower)
    tensor = child.read(own if own in child.names else name)
    return tensor[..., : config.towers[tower].hidden_size]


def _half_config(child: ModelConfig, _: str) -> ModelConfig:
    wide = child.towers[MAIN]
    half = dataclasses.replace(
        wide,
        hidden_size=wide.hidden_size // 2,
        num_heads=wide.num_heads // 2,
        num_kv_heads=wide.num_kv_heads // 2,
        ffn_size=wide.inner_size // 2,
        norm_groups=max(1, wide.norm_groups // 2),
    )
    return dataclasses.replace(child, towers={MAIN: half})


def _half(child: WeightsFolder, name: str, tower: str) -> Tensor:
    """A parent's tensor `name` in a JAM-Width: the first half is the LLM's. Of its block, the first
    column is the parent's own, but for a diagonal width, where it is the parent's column."""
    whole, half = child.read(name), int(tower != TEXT)
    if name in (TOKENS, POSITIONS, OUTPUT):
        return whole.chunk(2, dim=1)[half]
    rows = whole.chunk(2)[half]
    is_diagonal = child.provenance["recipe"]["fill"] == "diagonal"
    return rows if rows.dim() == 1 else rows.chunk(2, dim=1)[half if is_diagonal else 0]
