"""JAM-Cross: both towers kept, joined by bridges and a projection (paper section 2.1.3).

What the paper leaves open follows the authors' code and docs/architecture.md: text rows of the one
token table (and of an untied head), with <s> <pad> </s> <unk>, come from the LLM; rows of image
codes, <break>, <eoss> and sentinels from the image model, which alone has seen them; so do the
positions. An affine last norm is the parents' average. A shared table of unlike parents is as wide
as the wider: rows of the narrower end in zeros, positions and last norm are the wider one's.
"""

import dataclasses

from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, MAIN, TEXT, BridgeConfig, ModelConfig
from megatron_jam.models.parameters import POSITIONS, Parameter
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
        tables=recipe.tables,
        head=recipe.head,
        text_ids=list(text.vocabulary.text),
        alignment=recipe.alignment,
    )


def cross_tensor(
    entry: Parameter,
    config: ModelConfig,
    text: WeightsFolder,
    image: WeightsFolder,
    recipe: FusionRecipe,
) -> Tensor:
    """One weight of the child: a parent's, or a fresh one drawn from (seed, name)."""
    name, parents = entry.name, {TEXT: text, IMAGE: image}
    kind, *rest = name.split(".")
    if kind == "layers":
        layer, tower, *weight = rest
        return parents[tower].read(".".join([kind, layer, MAIN, *weight]))
    if entry.is_new:
        return initial_tensor(entry, config, seed=recipe.seed)
    if entry.tower is not None:
        return parents[entry.tower].read(name.replace(f".{entry.tower}.", "."))
    if entry.is_vocabulary:
        return _token_rows(name, text, image)
    widest = [each for each in (image, text) if each.config.hidden_size == config.hidden_size]
    found = [each.read(name) for each in widest if name in each.names]
    if name == POSITIONS or len(found) == 1:
        return found[0]
    return (found[0].double() + found[1].double()) / 2  # the last norm


def _token_rows(name: str, text: WeightsFolder, image: WeightsFolder) -> Tensor:
    span = text.vocabulary.text
    of_image, of_text = image.read(name), text.read(name, 0, span.start, span.stop)
    rows = of_image.new_zeros(len(of_image), max(of_image.shape[1], of_text.shape[1]))
    rows[:, : of_image.shape[1]] = of_image
    rows[span.start : span.stop] = F.pad(of_text, (0, rows.shape[1] - of_text.shape[1]))
    return rows
