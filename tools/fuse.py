"""Fuse two parents into JAM-Uniform, JAM-Width or JAM-Cross."""

from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.fuse import fuse


def main(recipe: Path) -> None:
    """Make the child that a recipe describes, as a weights folder.

    Args:
        recipe: YAML with method, text, image, output and the method's options.
    """
    fuse(FusionRecipe.load(recipe))


if __name__ == "__main__":
    run_command(main)
