"""JAM-Cross: both towers kept, joined by bridges and a projection (paper section 2.1.3).

What the paper leaves open follows the authors' code and docs/architecture.md: text rows of the one
token table (and of an untied head), with <s> <pad> </s> <unk>, come from the LLM; rows of image
codes, <break>, <eoss> and sentinels from the image model, which alone has seen them; so do the
positions. An affine last norm is the parents' average.
"""

import dataclasses
import re

from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, MAIN, TEXT, BridgeConfig, ModelConfig
from megatron_jam.models.parameters import (
    OUTPUT,
    POSITIONS,
    PROJECTION,
    TOKENS,
    parameter_table,
)
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.initial import initial_tensor


def cross_config(text: WeightsFolder, image: WeightsFolder, recipe: FusionRecipe) -> ModelConfig:
    """Two towers with bridges and a projection."""
    return dataclasses.replace(
        image.config,
        towers={IMAGE: image.config.towers[MAIN], TEXT: text.config.towers[MAIN]},
        bridges=BridgeConfig(
            every=recipe.every,
            layers=recipe.layers,
            into=recipe.into,
            kv_norm=recipe.kv_norm,
            start=recipe.bridges,
        ),
        projection_start=recipe.projection,
        separate=recipe.separate,
        text_ids=list(text.vocabulary.text) if recipe.separate else [0, 0],
    )


def cross_tensor(
    name: str, text: WeightsFolder, image: WeightsFolder, recipe: FusionRecipe
) -> Tensor:
    """One weight of the child: a parent's, or a fresh one drawn from (seed, name)."""
    own = re.fullmatch(f"(embedding|head)\\.({IMAGE}|{TEXT})\\.(.*)", name)
    if own:
        parent = {TEXT: text, IMAGE: image}[own[2]]
        return parent.read(f"{own[1]}.{own[3]}")
    if name in (TOKENS, OUTPUT):
        return _token_rows(name, text, image)
    if name == POSITIONS:
        return image.read(name)
    if name.startswith("head.norm."):
        return (text.read(name).double() + image.read(name).double()) / 2
    kind, *rest = name.split(".")
    if kind == "layers":
        layer, tower, *weight = rest
        parent = {TEXT: text, IMAGE: image}[tower]
        return parent.read(".".join([kind, layer, MAIN, *weight]))
    assert kind == "bridges" or name == PROJECTION, name
    config = cross_config(text, image, recipe)
    entry = next(e for e in parameter_table(config) if e.name == name)
    return initial_tensor(entry, config, seed=recipe.seed)


def _token_rows(name: str, text: WeightsFolder, image: WeightsFolder) -> Tensor:
    rows = image.read(name).clone()
    span = text.vocabulary.text
    rows[span.start : span.stop] = text.read(name, 0, span.start, span.stop)
    return rows
