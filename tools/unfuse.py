"""Take a parent out of a JAM-Cross or a JAM-Width."""

from pathlib import Path
from typing import Literal

from megatron_jam.config.cli import run_command
from megatron_jam.fusion.unfuse import unfuse


def main(weights: Path, tower: Literal["image", "text"], output: Path) -> None:
    """Write one tower of a JAM-Cross, or one half of a JAM-Width, as a weights folder of its own.

    Args:
        weights: weights folder of the fused model.
        tower: which parent.
        output: weights folder to write.
    """
    unfuse(weights, tower, output)


if __name__ == "__main__":
    run_command(main)
