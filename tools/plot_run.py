"""Draw a training run, or several over one another, from what they wrote to metrics.jsonl."""

from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.evaluation.curves import STYLES, Curves, draw, save_html, save_png


def main(runs: list[Path], *, output: Path | None = None) -> None:
    """Draw losses, perplexities, gradients, learning rate, speed, times and memory by step.

    Args:
        runs: output folders of training runs, also of ones that are under way; up to four.
        output: folder for curves.png and curves.html; default the first run's.
    """
    if not 1 <= len(runs) <= len(STYLES):
        raise UsageError(f"name 1 to {len(STYLES)} runs, not {len(runs)}")
    curves = [Curves.read(run) for run in runs]
    folder = output or runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    figure = draw(curves)
    save_png(figure, folder / "curves.png")
    save_html(figure, curves, folder / "curves.html")
    logger.info("wrote %s and curves.html", folder / "curves.png")


if __name__ == "__main__":
    run_command(main)
