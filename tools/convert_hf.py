"""Convert a checkpoint of Hugging Face (OPT, Llama, Chameleon) into a weights folder."""

import sys
from pathlib import Path
from typing import Literal

from megatron_jam.config.cli import run_command
from megatron_jam.config.log import logger
from megatron_jam.models.parameters import num_parameters
from megatron_jam.weights.conversion import plan_as_text
from megatron_jam.weights.hf_import import read_hugging_face


def main(
    direction: Literal["import"],
    source: Path,
    output: Path,
    *,
    tokenizer: Path | None = None,
    plan: bool = False,
) -> None:
    """Name a checkpoint's tensors as here, and prove the result.

    Args:
        direction: import.
        source: folder with config.json and safetensors files.
        output: weights folder to write.
        tokenizer: folder with its tokenizer.json and vocabulary.json; else they lie with the files.
        plan: print what becomes of every tensor, and write nothing.
    """
    conversion = read_hugging_face(source, tokenizer or source)
    if plan:
        sys.stdout.write(plan_as_text(conversion.steps))
        return
    certificate = conversion.write(output)
    logger.info(
        "wrote %s: %s parameters; largest difference of a logit: %.2g",
        output,
        f"{num_parameters(conversion.config):,}",
        certificate["largest_difference"],
    )


if __name__ == "__main__":
    run_command(main)
