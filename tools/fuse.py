"""Fuse two parents into JAM-Uniform, JAM-Width or JAM-Cross."""

import sys
from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.indexed import read_info
from megatron_jam.evaluation.logits import logits_if_room
from megatron_jam.evaluation.retention import measure_retention, save_retention
from megatron_jam.fusion.fuse import Fusion
from megatron_jam.parallel.world import start_world, stop_world


def main(
    recipe: Path,
    *,
    plan: bool = False,
    sets: list[DataSetConfig] | None = None,
    context_length: int = 0,
) -> None:
    """Make the child that a recipe describes, as a weights folder.

    What differs between the parents and whose rows the tokens take is printed first. The folder's
    provenance.json ends with a certificate: the largest error of any element, and how far the
    child's logits are from each parent's.

    Args:
        recipe: YAML with method, text, image, output and the method's options.
        plan: print the plan, line by line also that of the vocabulary, and write nothing.
        sets: prepared sets, `[{name: ..., path: PREFIX}, ...]`, on which parents and child are then
            measured: perplexity of text and of pictures.
        context_length: tokens read at once for that; 0 means as many as the model has positions.
    """
    settings = FusionRecipe.load(recipe)
    for each in sets or []:
        read_info(each.path)  # what is missing is told before the fusion
    fusion = Fusion.plan(settings)
    for line in fusion.as_lines():
        logger.info("%s", line)
    if plan:
        sys.stdout.write(fusion.parents.plan.as_tsv())
        return
    world = start_world(ParallelConfig())
    if world.size > 1:
        raise UsageError("fusion runs on one rank; start it without torchrun")
    certificate = fusion.write(model_logits=lambda path, ids: logits_if_room(path, ids, world))
    for name, value in certificate.items():
        if name != "prompts":
            logger.info("certificate: %s %s", name, value)
    if sets:
        folders = {"LLM": settings.text, "image model": settings.image, "child": settings.output}
        rows = measure_retention(folders, sets, world, context_length=context_length)
        save_retention(rows, settings.output)
    stop_world()


if __name__ == "__main__":
    run_command(main)
