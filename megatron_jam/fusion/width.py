"""JAM-Width: the parents' widths side by side (paper eq. 2 and 3).

A projection W becomes [[T, T], [I, I]], T the LLM's and I the image model's: each half of the
output is its parent's projection of the sum of both halves of the input. With `average` the second
column is (T + I) / 2 in both rows. With `diagonal` it is [[T, 0], [0, I]], and norms go by halves.
"""

import dataclasses

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, MAIN, TEXT, ModelConfig
from megatron_jam.fusion.blocks import Blocks, average, below, beside, zeros_like
from megatron_jam.fusion.parents import Parents
from megatron_jam.models.parameters import OUTPUT, POSITIONS, TOKENS, Parameter


def width_config(text: ModelConfig, image: ModelConfig, recipe: FusionRecipe) -> ModelConfig:
    """Twice the width, heads and FFN; heads stay whole, the LLM's first."""
    tower = text.towers[MAIN]
    wide = dataclasses.replace(
        tower,
        hidden_size=2 * tower.hidden_size,
        num_heads=2 * tower.num_heads,
        num_kv_heads=2 * tower.num_kv_heads,
        ffn_size=2 * tower.inner_size,
        norm_groups=tower.norm_groups * (2 if recipe.fill == "diagonal" else 1),
    )
    return dataclasses.replace(text, towers={MAIN: wide})


def width_tensor(entry: Parameter, parents: Parents) -> Blocks:
    """One weight of the child from the two of the same name."""
    t, i = (parents.get(tower, entry.name) for tower in (TEXT, IMAGE))
    if entry.name in (TOKENS, POSITIONS, OUTPUT):
        return beside(t, i)  # concatenated on the hidden dimension
    if len(t.shape) == 1:
        return below(t, i)  # biases and norms of each half
    match parents.recipe.fill:
        case "copy":
            return below(beside(t, t), beside(i, i))
        case "diagonal":
            return below(beside(t, zeros_like(t)), beside(zeros_like(i), i))
    mean = average(t, i, 1 / 2)
    return below(beside(t, mean), beside(i, mean))
