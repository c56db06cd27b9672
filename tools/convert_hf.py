"""Convert between Hugging Face's checkpoints and weights folders."""

import sys
from pathlib import Path
from typing import Any, Literal

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_not_read
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
    own_code: bool = False,
    vq_model: Path | None = None,
) -> None:
    """Name a model's tensors as the other program does, and prove the result.

    An OPT, a Llama, a Chameleon (Anole) and what was exported here come in. A model leaves as the
    class of transformers that computes it, or with its own code (trust_remote_code=True).

    Args:
        direction: import into a weights folder, or export one.
        source: folder with config.json and safetensors files; to export, a weights folder.
        output: folder to write.
        tokenizer: folder with the tokenizer.json and vocabulary.json of what is imported; else they
            lie with its files. Chameleon's needs no vocabulary.json: its tokens' names say it.
        plan: print what becomes of every imported tensor, and write nothing.
        own_code: export with its own code also what a class of transformers computes.
        vq_model: folder of a Chameleon, whose image tokenizer is exported with a Chameleon.
    """
    if direction == "export" and (plan or tokenizer):
        raise UsageError("--plan and --tokenizer are for import")
    if direction == "import" and (own_code or vq_model):
        raise UsageError("--own_code and --vq_model are for export")
    if direction == "export":
        certificate = export_hugging_face(source, output, own_code=own_code, vq_model=vq_model)
        report(output, WeightsFolder(source).config, certificate)
        return
    check_not_read(output, tokenizer or source)
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
