"""JAM-Uniform: every weight is an average of the parents' (paper eq. 1)."""

from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter
from megatron_jam.weights.folder import WeightsFolder


def uniform_config(text: WeightsFolder, image: WeightsFolder, recipe: FusionRecipe) -> ModelConfig:
    """The child has its parents' shape."""
    return text.config


def uniform_tensor(
    entry: Parameter,
    config: ModelConfig,
    text: WeightsFolder,
    image: WeightsFolder,
    recipe: FusionRecipe,
) -> Tensor:
    """share * LLM + (1 - share) * image model, in float64."""
    share = recipe.text_share
    return share * text.read(entry.name).double() + (1 - share) * image.read(entry.name).double()
