"""What a run calls on its way: reports, pictures, marks of good checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_jam.training.losses import Losses
from megatron_jam.training.step import StepResult

if TYPE_CHECKING:
    from megatron_jam.training.loop import Training


class Callback:
    """Each method is called on all ranks, and does nothing unless it is overridden.

    Steps are counted from 1: step n is the n-th of the run, whatever was resumed.
    """

    def begins(self, training: "Training", first: int) -> None:
        """Model, optimizer and data are there; `first` steps were made before."""

    def step_made(self, step: int, result: StepResult) -> None:
        """An optimizer step was made, or its batch was skipped."""

    def validated(self, step: int, measured: Mapping[str, Losses]) -> None:
        """The validation sets were measured with the weights after `step`, by name."""

    def saved(self, step: int, path: Path) -> None:
        """The checkpoint after `step` is whole at `path`."""

    def ends(self, step: int) -> None:
        """The run leaves its loop after `step`: finished, or stopped on request."""
