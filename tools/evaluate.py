"""Measure the perplexity of weights folders and checkpoints on texts and captioned pictures."""

import json
from pathlib import Path
from typing import Any, Literal

from megatron_jam.config.cli import run_command
from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.evaluation.perplexity import measure_folder
from megatron_jam.evaluation.sources import (
    PictureConfig,
    prepared_sets,
    scratch_folder,
    weights_of,
)
from megatron_jam.parallel.device import DTYPES
from megatron_jam.parallel.world import start_world, stop_world
from megatron_jam.training.losses import Losses
from megatron_jam.training.metrics import perplexity_of
from megatron_jam.weights.folder import WeightsFolder


def main(
    weights: list[Path],
    sets: list[DataSetConfig],
    *,
    context_length: int,
    micro_batch_size: int = 8,
    isolate_documents: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    parallel: ParallelConfig = ParallelConfig(),
    pictures: PictureConfig = PictureConfig(),
    scratch: Path | None = None,
    output: Path | None = None,
) -> None:
    """Print perplexities: of all tokens, and of text and image codes by themselves.

    Every token counts once, nothing is masked, so that a result is the same whenever and under
    whatever layout it is measured.

    Args:
        weights: weights folders, or training checkpoints (OUTPUT/checkpoints/step-N).
        sets: what to measure on, as `[{name: ..., path: ...}, ...]`: the PREFIX of a prepared set,
            a .jsonl (.gz, .zst), .parquet, .csv or .tsv of texts, a .jsonl of captions with image
            or codes, or a .json of captions as COCO has them.
        context_length: tokens that are read at once.
        micro_batch_size: contexts computed at once.
        isolate_documents: read each document by itself, for models that were trained so.
        precision: of weights and activations; losses are summed in fp32 and more.
        parallel: layout, under torchrun.
        pictures: how pictures of captions become codes.
        scratch: folder for what has to be prepared: sets stay, a checkpoint's weights go once they
            are measured. Ranks of several hosts need one that all of them see. By default a
            temporary one.
        output: JSON file of the results.
    """
    if not weights or not sets:
        raise UsageError("name at least one weights folder and one set")
    world = start_world(parallel)
    results = []
    with scratch_folder(scratch, world) as room:
        for path in weights:
            with weights_of(path, room, world) as folder:
                measured = measure_folder(
                    folder,
                    prepared_sets(sets, WeightsFolder(folder), pictures, room, world),
                    world,
                    context_length=context_length,
                    micro_batch_size=micro_batch_size,
                    isolate_documents=isolate_documents,
                    dtype=DTYPES[precision],
                )
            results += [_result(path, *each) for each in measured.items()]
    if output is not None and world.rank == 0:
        write_text_atomically(output, json.dumps(results, indent=2) + "\n")
    stop_world()


def _result(path: Path, name: str, losses: Losses) -> dict[str, Any]:
    """What is printed and saved of a set."""
    perplexity = {kind: perplexity_of(nats) for kind, nats in losses.by_modality().items()}
    perplexity["all"] = perplexity_of(losses.mean)
    figures = ", ".join(f"{kind} {value:.2f}" for kind, value in perplexity.items())
    logger.info("%s | %s | perplexity %s", path, name, figures)
    tokens = losses.tokens()
    return {"weights": str(path), "set": name, "perplexity": perplexity, "tokens": tokens}


if __name__ == "__main__":
    run_command(main)
