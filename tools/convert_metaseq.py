"""Convert a checkpoint of metaseq (OPT, CM3leon, the authors' JAM-Cross) into a weights folder."""

import sys
from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.models.parameters import num_parameters
from megatron_jam.weights.metaseq.convert import Conversion, Step


def main(
    *,
    input: str = "",
    output: Path | None = None,
    tokenizer: Path | None = None,
    num_heads: int = 0,
    activation: str = "",
    plan: bool = False,
) -> None:
    """Merge a checkpoint's parts and shards, name its tensors, and prove the result.

    Neither metaseq nor fairscale nor omegaconf is needed, and nothing that the files name is run.

    Args:
        input: the checkpoint: a file, a folder, or a pattern such as 'DIR/checkpoint_5960*.pt'.
        output: weights folder to write.
        tokenizer: folder with its tokenizer.json and vocabulary.json; else they lie with the files.
        num_heads: attention heads, where the checkpoint does not say.
        activation: relu, gelu (the tanh form) or swiglu, where the checkpoint does not say.
        plan: print what becomes of every tensor, and write nothing.
    """
    if not input:
        raise UsageError("name the checkpoint: --input FILE, FOLDER or 'PATTERN'")
    beside = Path(input) if Path(input).is_dir() else Path(input).parent
    conversion = Conversion(input, tokenizer or beside, num_heads=num_heads, activation=activation)
    if plan:
        sys.stdout.write(as_text(conversion.steps))
        return
    if output is None:
        raise UsageError("name the --output to write, or look at it first with --plan")
    certificate = conversion.write(output)
    logger.info(
        "wrote %s: %s parameters; largest difference of a logit: %.2g",
        output,
        f"{num_parameters(conversion.config):,}",
        certificate["largest_difference"],
    )


def as_text(steps: list[Step]) -> str:
    """A line for each tensor: its key and shape, what is done, and what it becomes."""
    lines = [("key", "shape", "action", "becomes")]
    for step in steps:
        shape = " x ".join(map(str, step.shape))
        lines.append((step.source or "-", shape, step.action, step.target or "-"))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "".join(
        "  ".join(each.ljust(width) for each, width in zip(line, widths, strict=False))
        + f"  {line[3]}\n"
        for line in lines
    )


if __name__ == "__main__":
    run_command(main)
