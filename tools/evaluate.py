"""Measure a weights folder's perplexity on prepared sets."""

import json
import math
from pathlib import Path
from typing import Literal

from megatron_jam.config.cli import run_command
from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.evaluation.perplexity import measure_folder
from megatron_jam.parallel.device import DTYPES
from megatron_jam.parallel.world import start_world, stop_world


def main(
    weights: list[Path],
    sets: list[DataSetConfig],
    *,
    context_length: int,
    micro_batch_size: int = 8,
    isolate_documents: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    parallel: ParallelConfig = ParallelConfig(),
    output: Path | None = None,
) -> None:
    """Print perplexities by modality; every token counts once, nothing is masked.

    Args:
        weights: weights folders to measure.
        sets: prepared sets as `[{name: ..., path: PREFIX}, ...]`.
        context_length: tokens that are read at once.
        micro_batch_size: contexts computed at once.
        isolate_documents: read each document by itself, for models that were trained so.
        precision: of weights and activations; losses are summed in fp32 and more.
        parallel: layout, under torchrun.
        output: JSON file of the results.
    """
    if not weights or not sets:
        raise UsageError("name at least one weights folder and one set")
    world = start_world(parallel)
    results = []
    for folder in weights:
        measured = measure_folder(
            folder,
            sets,
            world,
            context_length=context_length,
            micro_batch_size=micro_batch_size,
            isolate_documents=isolate_documents,
            dtype=DTYPES[precision],
        )
        for name, losses in measured.items():
            perplexity = {k: math.exp(min(v, 700)) for k, v in losses.by_modality().items()}
            perplexity["all"] = math.exp(min(losses.mean, 700))
            results.append({"weights": str(folder), "set": name, "perplexity": perplexity})
            figures = ", ".join(f"{k} {v:.2f}" for k, v in perplexity.items())
            logger.info("%s | %s | perplexity %s", folder, name, figures)
    if output is not None and world.rank == 0:
        write_text_atomically(output, json.dumps(results, indent=2) + "\n")
    stop_world()


if __name__ == "__main__":
    run_command(main)
