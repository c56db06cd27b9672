"""What all ranks decide alike in a step: whether it counts, and whether to stop behind it."""

import math

from torch import Tensor

from megatron_jam.training.health import Health
from megatron_jam.training.stop import StopPoll


class Agreement:
    """Judges steps by their health; see `step.Judge`."""

    def __init__(self, health: Health, stop: StopPoll) -> None:
        """Judge by `health`, and ask `stop` in the same message."""
        self._health, self._stop = health, stop

    def message(self, loss: float) -> Tensor:
        """That the loss is not finite here, and what `stop` is to say."""
        return self._stop.message(says=not math.isfinite(loss))

    def __call__(self, loss: float, grad_norm: float, messages: Tensor) -> str:
        """Why the step is to be skipped, or nothing; raises as `Health.judge`."""
        is_spoilt = self._stop.hear(messages)
        reason = self._health.judge(loss, grad_norm)
        return reason or ("the loss of another rank is not finite" if is_spoilt else "")
