"""JAM-Cross: both towers kept, joined by bridges and a projection (paper section 2.1.3).

What the paper leaves open follows the authors' code and docs/architecture.md: text rows of the one
token table (and of an untied head), with <s> <pad> </s> <unk>, come from the LLM; rows of image
codes, <break>, <eoss> and sentinels from the image model, which alone has seen them; so do the
positions. An affine last norm is the parents' average. A shared table of unlike parents is as wide
as the wider: rows of the narrower end in zeros, positions and last norm are the wider one's.
"""

import dataclasses

import numpy as np
import torch

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, MAIN, TEXT, BridgeConfig, ModelConfig
from megatron_jam.fusion.blocks import Blocks, average, widened
from megatron_jam.fusion.parents import Parents
from megatron_jam.fusion.positions import named_parent
from megatron_jam.models.parameters import POSITIONS, Parameter
from megatron_jam.weights.initial import initial_rows


def cross_config(text: ModelConfig, image: ModelConfig, recipe: FusionRecipe) -> ModelConfig:
    """Two towers with bridges and a projection. Output rows of their own, if a parent has such."""
    return dataclasses.replace(
        image,
        towers={IMAGE: image.towers[MAIN], TEXT: text.towers[MAIN]},
        tied=image.tied and text.tied,
        bridges=BridgeConfig(
            every=recipe.every,
            layers=recipe.layers,
            into=recipe.into,
            kv_norm=recipe.kv_norm,
            start=recipe.bridges,
        ),
        projection_start=recipe.projection,
        tables=recipe.tables,
        head=recipe.head,
        alignment=recipe.alignment,
    )


def cross_tensor(entry: Parameter, parents: Parents) -> Blocks:
    """One weight of the child: a parent's, or a fresh one drawn from (seed, name)."""
    name, config = entry.name, parents.config
    kind, *rest = name.split(".")
    if kind == "layers":
        layer, tower, *weight = rest
        return parents.get(tower, ".".join([kind, layer, MAIN, *weight]))
    if entry.is_new:
        return Blocks(
            shape=entry.shape,
            rows=lambda i, j: initial_rows(entry, config, i, j, seed=parents.recipe.seed),
        )
    if entry.tower is not None:
        return parents.get(entry.tower, name.replace(f".{entry.tower}.", "."))
    if entry.is_vocabulary:
        return _token_rows(name, parents)
    if name == POSITIONS and (one := named_parent(parents.recipe)) is not None:
        return widened(parents.get(one, name), config.hidden_size)
    widest = [t for t in (IMAGE, TEXT) if config.towers[t].hidden_size == config.hidden_size]
    found = [parents.get(tower, name) for tower in widest if parents.has(tower, name)]
    if name == POSITIONS or len(found) == 1:
        return found[0]
    return average(found[1], found[0], 1 / 2)  # the last norm


def _token_rows(name: str, parents: Parents) -> Blocks:
    image, text = (parents.get(tower, name) for tower in (IMAGE, TEXT))
    columns = max(image.shape[1], text.shape[1])
    image, text = widened(image, columns), widened(text, columns)
    is_text = torch.from_numpy(np.array(parents.plan.takes) == TEXT)[:, None]
    return Blocks(
        shape=image.shape,
        rows=lambda i, j: torch.where(is_text[i:j], text.rows(i, j), image.rows(i, j)),
    )
