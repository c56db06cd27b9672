"""From a recipe and two parents to a child, tensor by tensor."""

import dataclasses
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.log import logger
from megatron_jam.config.model import ModelConfig
from megatron_jam.fusion.cross import cross_config, cross_tensor
from megatron_jam.fusion.uniform import uniform_config, uniform_tensor
from megatron_jam.fusion.width import width_config, width_tensor
from megatron_jam.models.parameters import TOKENS, num_parameters, parameter_table
from megatron_jam.weights.folder import FolderWriter, WeightsFolder
from megatron_jam.weights.load import check_tensors

METHODS = {
    "uniform": (uniform_config, uniform_tensor),
    "width": (width_config, width_tensor),
    "cross": (cross_config, cross_tensor),
}


def fuse(recipe: FusionRecipe) -> ModelConfig:
    """Write the child of `recipe` as a weights folder in the LLM's dtype; return its description.

    Raises:
        UsageError: if the parents do not fit each other or the method; nothing is written.
    """
    text, image = WeightsFolder(recipe.text), WeightsFolder(recipe.image)
    check_parents(text, image, recipe)
    configure, compute = METHODS[recipe.method]
    config = configure(text, image, recipe)
    table = parameter_table(config)
    shapes = {entry.name: entry.shape for entry in table}
    dtype = text.read(TOKENS, 0, 0, 1).dtype
    with FolderWriter(
        recipe.output, config=config, source=text.path, shapes=shapes, dtype=dtype
    ) as writer:
        for entry in table:
            writer.write(entry.name, compute(entry, config, text, image, recipe))
        settings = {k: v for k, v in dataclasses.asdict(recipe).items() if k != "output"}
        writer.finish(
            {
                "made_by": "tools/fuse.py",
                "image_tokenizer_sha256": image.image_tokenizer_sha256,
                "recipe": {name: str(value) for name, value in settings.items()},
                "parents": {
                    "text": _origin(text),
                    "image": _origin(image),
                },
            }
        )
    logger.info(
        "wrote %s: JAM-%s, %s parameters",
        recipe.output,
        recipe.method.capitalize(),
        f"{num_parameters(config):,}",
    )
    return config


def _origin(parent: WeightsFolder) -> dict[str, Any]:
    """Where a parent comes from, without what it has written down of its own parents' tensors."""
    kept = {k: v for k, v in parent.provenance.items() if k not in ("sha256", "parents")}
    return {"folder": str(parent.path), "sha256": parent.sha256, **kept}


def check_parents(text: WeightsFolder, image: WeightsFolder, recipe: FusionRecipe) -> None:
    """Raise UsageError, naming what differs, unless the two can be fused by the recipe's method."""
    for folder in (text, image):
        if recipe.output.resolve() == folder.path.resolve():
            raise UsageError(f"output {recipe.output} is a parent; name another folder")
        if folder.config.is_pair:
            raise UsageError(f"{folder.path} has two towers already; a parent has one")
        check_tensors(folder)
    text.require_vocabulary(image.vocabulary, str(image.path))
    # The vocabulary says which ids are text, but only the tokenizer what text they are.
    if text.tokenizer_path.read_bytes() != image.tokenizer_path.read_bytes():
        raise UsageError(
            f"{text.tokenizer_path} and {image.tokenizer_path} differ; parents share one tokenizer"
        )
    # JAM-Cross takes towers as they are.
    same = ["max_positions", "position_offset", "tied"]
    same += [] if recipe.method == "cross" else ["towers"]
    differing = [name for name in same if getattr(text.config, name) != getattr(image.config, name)]
    if differing:
        raise UsageError(
            f"method {recipe.method} needs parents of one shape; {text.path} and {image.path}"
            f" differ in {', '.join(differing)}"
        )
