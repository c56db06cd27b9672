"""Marks the checkpoint with the lowest average over the validation sets: the paper's rule."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_jam.config.files import read_json, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import mark_best
from megatron_jam.training.losses import Losses, mean_by_modality

if TYPE_CHECKING:
    from megatron_jam.training.loop import Training

BEST_FILE = "best.json"
"""In a run's folder: step, average loss and folder of the best checkpoint."""


class BestCheckpoint(Callback):
    """Keeps the best checkpoint beside the newest ones, and says which it is in OUTPUT/best.json.

    A step counts that was both measured and saved, in either order.
    """

    def __init__(self, output: Path, *, writes: bool) -> None:
        """Mark checkpoints of the run in `output`, on the rank that `writes`."""
        self._output, self._writes = output, writes
        self._measured: dict[int, float] = {}
        self._saved = -1
        self._lowest: float | None = None

    def begins(self, training: "Training", first: int) -> None:
        """Go on from what was best; what a run wrote after `first` and lost does not count."""
        path = self._output / BEST_FILE
        if self._writes and path.is_file():
            known = read_json(path)
            if known["step"] <= first:
                self._lowest = known["loss"]
            else:
                path.unlink()
        self._saved = first

    def validated(self, step: int, measured: Mapping[str, Losses]) -> None:
        """Remember the average."""
        if measured:
            self._measured = {step: mean_by_modality(measured)["all"]}
            self._mark(step)

    def saved(self, step: int, path: Path) -> None:
        """Take note of the checkpoint."""
        self._saved = step
        self._mark(step)

    def _mark(self, step: int) -> None:
        loss = self._measured.get(step, math.nan)
        if not math.isfinite(loss) or self._saved != step or not self._writes:
            return
        if self._lowest is None or loss < self._lowest:
            self._lowest = loss
            mark_best(self._output / "checkpoints", step)
            values = {"step": step, "loss": loss, "checkpoint": f"checkpoints/step-{step:08d}"}
            write_text_atomically(self._output / BEST_FILE, json.dumps(values) + "\n")
            logger.info("step %d | lowest average of the validation sets yet: %.4f", step, loss)
