"""JAM-Uniform: every weight is an average of the parents' (paper eq. 1)."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, TEXT, ModelConfig
from megatron_jam.fusion.blocks import Blocks, average
from megatron_jam.fusion.parents import Parents
from megatron_jam.fusion.positions import named_parent
from megatron_jam.fusion.vocabulary import BOTH
from megatron_jam.models.parameters import POSITIONS, Parameter


def uniform_config(text: ModelConfig, image: ModelConfig, recipe: FusionRecipe) -> ModelConfig:
    """The child has its parents' shape."""
    return dataclasses.replace(text)


def uniform_tensor(entry: Parameter, parents: Parents) -> Blocks:
    """share * LLM + (1 - share) * image model; the row of a token that one parent alone has is
    that one's."""
    one = named_parent(parents.recipe)
    if entry.name == POSITIONS and one is not None:
        return parents.get(one, entry.name)
    text, image = (parents.get(tower, entry.name) for tower in (TEXT, IMAGE))
    share = parents.recipe.text_share
    # A weight of 0 takes nothing, not even a NaN.
    mean = {0.0: image, 1.0: text}.get(share) or average(text, image, share)
    if not entry.is_vocabulary:
        return mean
    takes = np.array(parents.plan.takes)
    if (takes == BOTH).all():
        return mean
    is_both, is_text = (torch.from_numpy(takes == each)[:, None] for each in (BOTH, TEXT))

    def rows(i: int, j: int) -> Tensor:
        of_one = torch.where(is_text[i:j], text.rows(i, j), image.rows(i, j))
        return torch.where(is_both[i:j], mean.rows(i, j), of_one)

    return Blocks(shape=mean.shape, rows=rows)
