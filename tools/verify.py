"""Check a weights folder: index, shapes, dtype, and the sha256 of every tensor and small file."""

from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.log import logger
from megatron_jam.weights.verify import verify


def main(folder: Path) -> None:
    """Read a whole weights folder and compare it with what its maker wrote down.

    Args:
        folder: weights folder.
    """
    logger.info("%s: %d tensors, all as they were written", folder, verify(folder))


if __name__ == "__main__":
    run_command(main)
