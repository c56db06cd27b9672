"""The way back: one parent out of a JAM-Cross or a JAM-Width.

What fusion kept apart comes back bit for bit: towers, per-tower tables, the wide head's norms, the
halves of a width. What the towers share (a token table, the projecting head's norm) comes back as
the child has it. Of what the narrower tower reads through a projection that is its first columns,
which is right while the projection is the identity as which it began, and refused otherwise; so is
a last norm that is the wider tower's alone.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_not_read
from megatron_jam.config.log import logger
from megatron_jam.config.model import MAIN, PAIR, TEXT, BridgeConfig, ModelConfig
from megatron_jam.models.parameters import (
    OUTPUT,
    POSITIONS,
    PROJECTION,
    TOKENS,
    Parameter,
    num_parameters,
    of_tower,
    parameter_table,
)
from megatron_jam.weights.folder import PROVENANCE, FolderWriter, WeightsFolder
from megatron_jam.weights.load import check_tensors
from megatron_jam.weights.stream import tensor_sha256


def unfuse(weights: Path, tower: str, output: Path) -> ModelConfig:
    """Write a parent of a fused model as a weights folder; return its description.

    Args:
        weights: weights folder of a JAM-Cross, or of a JAM-Width from `tools/fuse.py`.
        tower: `text` or `image`.
        output: folder to write.

    Raises:
        UsageError: the model has no such parent to give back, or is not what was written.
    """
    child = WeightsFolder(weights)
    if tower not in PAIR:
        raise UsageError(f"tower is {tower!r}; choose one of image, text")
    check_not_read(output, child.path)
    _check_fused(child, tower)
    part = _tower if child.config.is_pair else _half
    config = (_tower_config if child.config.is_pair else _half_config)(child.config, tower)
    table = parameter_table(config)
    if child.config.is_pair:
        _check_given_back(child, tower, table)
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


def _check_fused(child: WeightsFolder, tower: str) -> None:
    """Raise UsageError unless this is a whole JAM-Cross, or a JAM-Width that says how it was made,
    and what it says of the parent can be read."""
    _recorded_sha256(child, tower)
    if not child.config.is_pair:
        recipe = _mapping(child.provenance, "recipe", child.path)
        if recipe.get("method") != "width":
            raise UsageError(
                f"{child.path} is neither a JAM-Cross nor a JAM-Width of tools/fuse.py"
            )
        if (fill := recipe.get("fill")) not in ("copy", "average", "diagonal"):
            raise UsageError(
                f"{child.path / PROVENANCE}: fill of the recipe is {fill!r}, not copy, average or"
                " diagonal: copy the folder again"
            )
        _check_two_halves(child)
    check_tensors(child)


def _check_two_halves(child: WeightsFolder) -> None:
    wide = child.config.towers[MAIN]
    halved = ("hidden_size", "num_heads", "num_kv_heads", "inner_size")
    if odd := [name for name in halved if getattr(wide, name) % 2]:
        raise UsageError(
            f"{child.path}: its recipe says width, but {odd[0]} is {getattr(wide, odd[0])}, no two"
            " halves: copy the folder again"
        )


def _check_given_back(child: WeightsFolder, tower: str, table: list[Parameter]) -> None:
    """Raise UsageError where a JAM-Cross no longer has what a tower computed with."""
    whose = "the LLM" if tower == TEXT else "the image model"
    for name in (entry.name for entry in table if entry.name.startswith("head.norm.")):
        source = _source(child, name, tower)
        # A norm of both towers is as wide as the wider one: the narrower one's is not in it.
        if source is None or (source == name and tower in child.config.projected_towers):
            raise UsageError(
                f"{child.path} has no {name} of {whose} to give back: its head is shared by"
                " both towers, and the fusion dropped that norm; fuse with `head: wide`"
            )
    for room in ("embedding.projection.weight", PROJECTION):
        name = of_tower(room, tower)
        # With `head: project` each tower's head reads both towers, and is no parent's.
        if name not in child.names or (room == PROJECTION and child.config.head == "project"):
            continue
        weight = _read(child, name)
        if not torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype)):
            raise UsageError(
                f"{child.path}: tower {tower} reads the shared table through {name}, which is no"
                " longer the identity as which it began, so no table of its own is left to give"
                " back; fuse with `tables: per_tower` to take towers out after training"
            )


_TOLD = {
    True: "bit for bit the parent that was fused",
    False: "not bit for bit the parent that was fused: what the model shares between its parents, "
    "and its dtype, stay",
    None: "not compared: the model's provenance.json does not say what its parents were",
}


def _is_the_parent(found: WeightsFolder, child: WeightsFolder, tower: str) -> bool | None:
    """Whether all tensors have the bytes that the parent's had; None if nobody wrote them down."""
    due = _recorded_sha256(child, tower)
    return None if due is None else found.sha256 == due


def _recorded_sha256(child: WeightsFolder, tower: str) -> str | None:
    parents = _mapping(child.provenance, "parents", child.path)
    return _mapping(parents, tower, child.path).get("sha256")


def _mapping(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """What a name of provenance.json stands for; nothing if it is not there."""
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise UsageError(f"{path / PROVENANCE}: {name} is {found!r}, no object: copy it again")
    return found


def _read(child: WeightsFolder, name: str) -> Tensor:
    """A whole tensor; UsageError if it is not what was written: the parent's hashes are new."""
    tensor = child.read(name)
    if tensor_sha256(tensor) != child.hashes[name]:
        raise UsageError(
            f"{child.path}: {name} is not what was written, by its sha256: copy the folder again"
        )
    return tensor


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


def _source(child: WeightsFolder, name: str, tower: str) -> str | None:
    """A JAM-Cross's name for tensor `name` of a parent; None if it has none."""
    if name.startswith("layers."):
        return name.replace(f".{MAIN}.", f".{tower}.")
    own = of_tower(name, tower)
    return next((each for each in (own, name) if each in child.names), None)


def _tower(child: WeightsFolder, name: str, tower: str) -> Tensor:
    """A parent's tensor `name` in a JAM-Cross; of a wider shared table its first columns."""
    source = _source(child, name, tower)
    assert source is not None, f"{name} was not asked for before"
    tensor = _read(child, source)
    if name.startswith("layers."):
        return tensor
    return tensor[..., : child.config.towers[tower].hidden_size]


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
    whole, half = _read(child, name), int(tower != TEXT)
    if name in (TOKENS, POSITIONS, OUTPUT):
        return whole.chunk(2, dim=1)[half]
    rows = whole.chunk(2)[half]
    is_diagonal = child.provenance["recipe"]["fill"] == "diagonal"
    return rows if rows.dim() == 1 else rows.chunk(2, dim=1)[half if is_diagonal else 0]
