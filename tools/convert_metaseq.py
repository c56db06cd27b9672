"""Convert a checkpoint of metaseq (OPT, CM3leon, the authors' JAM-Cross) into a weights folder."""

import sys
from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_not_read
from megatron_jam.config.log import logger
from megatron_jam.models.parameters import num_parameters
from megatron_jam.weights.conversion import plan_as_text
from megatron_jam.weights.metaseq.convert import read_metaseq


def main(
    *,
    input: str = "",
    output: Path | None = None,
    tokenizer: Path | None = None,
    num_heads: int = 0,
    activation: str = "",
    every: int = 0,
    plan: bool = False,
) -> None:
    """Merge a checkpoint's parts and shards, name its tensors, and prove the result.

    Neither metaseq nor fairscale nor omegaconf is needed, and nothing that the files name is run.

    Args:
        input: the checkpoint: a file, a folder, or a pattern such as 'DIR/checkpoint_5960*.pt'.
        output: weights folder to write.
        tokenizer: folder with its tokenizer.json and vocabulary.json; else they lie with the files.
        num_heads: attention heads, where the checkpoint does not say.
        activation: relu, gelu (the tanh form), swiglu or geglu, where the checkpoint does not say.
        every: of JAM-Cross: after each how many layers bridges stand, where their number does not
            tell.
        plan: print what becomes of every tensor, and write nothing.
    """
    if not input:
        raise UsageError("name the checkpoint: --input FILE, FOLDER or 'PATTERN'")
    beside = Path(input) if Path(input).is_dir() else Path(input).parent
    conversion = read_metaseq(
        input, tokenizer or beside, num_heads=num_heads, activation=activation, every=every
    )
    if plan:
        sys.stdout.write(plan_as_text(conversion.steps))
        return
    if output is None:
        raise UsageError("name the --output to write, or look at it first with --plan")
    check_not_read(output, tokenizer or beside)
    certificate = conversion.write(output)
    logger.info(
        "wrote %s: %s parameters; largest difference of a logit: %.2g",
        output,
        f"{num_parameters(conversion.config):,}",
        certificate["largest_difference"],
    )


if __name__ == "__main__":
    run_command(main)
