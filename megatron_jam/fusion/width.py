"""JAM-Width: the parents' widths side by side (paper eq. 2 and 3).

A projection W becomes [[T, T], [I, I]], T the LLM's and I the image model's: each half of the
output is its parent's projection of the sum of both halves of the input. With `average` the second
column is (T + I) / 2 in both rows.
"""

import dataclasses

import torch
from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import MAIN, ModelConfig
from megatron_jam.models.parameters import OUTPUT, POSITIONS, TOKENS, Parameter
from megatron_jam.weights.folder import WeightsFolder


def width_config(text: WeightsFolder, image: WeightsFolder, recipe: FusionRecipe) -> ModelConfig:
    """Twice the width, heads and FFN; heads stay whole, the LLM's first."""
    tower = text.config.towers[MAIN]
    wide = dataclasses.replace(
        tower,
        hidden_size=2 * tower.hidden_size,
        num_heads=2 * tower.num_heads,
        num_kv_heads=2 * tower.num_kv_heads,
        ffn_size=2 * tower.inner_size,
    )
    return dataclasses.replace(text.config, towers={MAIN: wide})


def width_tensor(
    entry: Parameter,
    config: ModelConfig,
    text: WeightsFolder,
    image: WeightsFolder,
    recipe: FusionRecipe,
) -> Tensor:
    """One weight of the child from the two of the same name, in float64 if averaged."""
    t, i = text.read(entry.name), image.read(entry.name)
    if entry.name in (TOKENS, POSITIONS, OUTPUT):
        return torch.cat([t, i], dim=1)  # concatenated on the hidden dimension
    if t.dim() == 1:
        return torch.cat([t, i])  # biases and norms of each half
    if recipe.fill == "copy":
        return torch.cat([torch.cat([t, t], dim=1), torch.cat([i, i], dim=1)])
    t, i = t.double(), i.double()
    mean = (t + i) / 2
    return torch.cat([torch.cat([t, mean], dim=1), torch.cat([i, mean], dim=1)])
