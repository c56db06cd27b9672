"""Convert between Hugging Face's checkpoints (OPT, Llama, Chameleon) and weights folders."""

import sys
from pathlib import Path
from typing import Any, Literal

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import num_parameters
from megatron_jam.weights.conversion import plan_as_text
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.hf_export import export_hugging_face
from megatron_jam.weights.hf_import import read_hugging_face


def main(
    direction: Literal["import", "export"],
    source: Path,
    output: Path,
    *,
    tokenizer: Path | None = None,
    plan: bool = False,
) -> None:
    """Name a model's tensors as the other program does, and prove the result.

    Args:
        direction: import into a weights folder; export as a stock OPT or Llama.
        source: folder with config.json and safetensors files; to export, a weights folder.
        output: folder to write.
        tokenizer: folder with the tokenizer.json and vocabulary.json of what is imported; else they
            lie with its files.
        plan: print what becomes of every imported tensor, and write nothing.
    """
    if direction == "export" and (plan or tokenizer):
        raise UsageError("--plan and --tokenizer are for import")
    if direction == "export":
        report(output, WeightsFolder(source).config, export_hugging_face(source, output))
        return
    conversion = read_hugging_face(source, tokenizer or source)
    if plan:
        sys.stdout.write(plan_as_text(conversion.steps))
        return
    report(output, conversion.config, conversion.write(output))


def report(output: Path, config: ModelConfig, certificate: dict[str, Any]) -> None:
    """Say what was written."""
    logger.info(
        "wrote %s: %s parameters; largest difference of a logit: %.2g",
        output,
        f"{num_parameters(config):,}",
        certificate["largest_difference"],
    )


if __name__ == "__main__":
    run_command(main)
