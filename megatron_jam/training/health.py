"""Whether a step is to be learnt from: finite numbers, spikes, steps that are left out."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from megatron_jam.config.health import HealthConfig
from megatron_jam.config.log import logger

_MAD_TO_DEVIATION = 1.4826
_LEAST_DEVIATION = 0.01
_MIN_LOSSES = 8
"""Fewer losses than these say nothing of what is usual."""


LEFT_OUT = "it is listed in health.skip_steps"
"""Why a step is skipped that a person left out; it says nothing of the run's health."""


class Unhealthy(Exception):
    """The run is not worth going on with; the message says why. Raised on all ranks."""


class Health:
    """Judges steps; its state goes into checkpoints, so that a resumed run judges alike."""

    def __init__(self, config: HealthConfig) -> None:
        """Judge by `config`, with no steps behind."""
        self._config = config
        self._losses: deque[float] = deque(maxlen=max(1, config.spike_window))
        self.skipped = 0
        """Steps without an update so far."""
        self.skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """For `restore`, as plain JSON values."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "losses": list(self._losses),
        }

    def state_before(self) -> dict[str, Any]:
        """The same as it was before the last row of skipped steps."""
        return {
            **self.state(),
            "skipped": self.skipped - self.skipped_in_a_row,
            "skipped_in_a_row": 0,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which may be empty."""
        self.skipped = state.get("skipped", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self._losses.clear()
        self._losses.extend(state.get("losses", []))

    def leaves_out(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is among those to skip."""
        return step in self._config.skip_steps

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why a step with this mean loss and gradient is to be skipped, or nothing.

        Raises:
            Unhealthy: the loss is a spike, at which the run is to stop.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        usual = self._spike(loss)
        if usual:
            what = f"the loss {loss:.4f} is a spike: {usual}"
            if self._config.on_spike == "stop":
                raise Unhealthy(what)
            if self._config.on_spike == "skip":
                return what
            logger.info("%s", what)
        self._losses.append(loss)
        return ""

    def count(self, skipped: str) -> None:
        """Count a step that was learnt from, or was skipped for a reason."""
        if skipped == LEFT_OUT:
            return
        self.skipped += bool(skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    @property
    def is_hopeless(self) -> bool:
        """Whether more steps than are allowed were skipped in a row."""
        return self.skipped_in_a_row > self._config.max_skipped

    def _spike(self, loss: float) -> str:
        """What is usual, if `loss` is far above it."""
        if not self._config.spike_window or len(self._losses) < _MIN_LOSSES:
            return ""
        middle = median(self._losses)
        spread = _MAD_TO_DEVIATION * median(abs(each - middle) for each in self._losses)
        limit = middle + self._config.spike_deviations * max(spread, _LEAST_DEVIATION * middle)
        if loss <= limit:
            return ""
        return (
            f"the last {len(self._losses)} have the median {middle:.4f}, the limit is {limit:.4f}"
        )
