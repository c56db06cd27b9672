"""When a run skips a step, warns or stops by itself."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_jam.config.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What a run watches. A step whose loss or gradient is not finite is always skipped."""

    max_skipped: int = 10
    """Steps skipped in a row, by themselves, after which the run saves the state of before them
    and stops."""

    spike_window: int = 100
    """Last losses that a step's loss is compared with; 0 looks for no spikes."""

    spike_deviations: float = 8.0
    """A loss this many deviations (1.48 times the median distance from the median, and at least
    1% of the median) above the window's median is a spike."""

    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """What a spike does: a line in the log, that, and no update; or the run stops before it."""

    skip_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose batches are left out, as after a spike that was found late."""

    compare_replicas_every: int = 1000
    """Steps between comparisons of all copies of each weight over the ranks; 0 for none but the
    first."""

    hang_seconds: float = 1800.0
    """Time without any progress on a rank after which the run says who is late, writes all ranks'
    stacks to OUTPUT/stacks and ends; 0 waits for ever."""

    def __post_init__(self) -> None:
        for name in ("max_skipped", "spike_window", "compare_replicas_every", "hang_seconds"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"health.{name} is {getattr(self, name)}; it must be 0 or more")
        if not self.spike_deviations > 0:
            raise UsageError(
                f"health.spike_deviations is {self.spike_deviations}; it must be above 0"
            )
        if any(step < 1 for step in self.skip_steps):
            raise UsageError(f"health.skip_steps is {self.skip_steps}; steps are counted from 1")
