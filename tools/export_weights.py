"""Make a weights folder of a training checkpoint."""

from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.log import logger


def main(checkpoint: Path, folder: Path) -> None:
    """Write the weights of a training checkpoint as a weights folder, tensor by tensor.

    Args:
        checkpoint: a run's OUTPUT/checkpoints/step-N, checked first.
        folder: weights folder to make.
    """
    from megatron_jam.training.export import export_checkpoint

    export_checkpoint(checkpoint, folder)
    logger.info("wrote %s", folder)


if __name__ == "__main__":
    run_command(main)
