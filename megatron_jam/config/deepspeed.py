"""How DeepSpeed's ZeRO splits what a data-parallel rank holds."""

from dataclasses import dataclass
from typing import Literal

from megatron_jam.config.checks import check_types
from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Settings of `engine: deepspeed`."""

    stage: Literal[2, 3] = 2
    """What the ranks share out: gradients and the optimizer's state (2), or the weights too (3),
    which are then gathered layer by layer in every pass."""

    offload_optimizer: bool = False
    """Whether the optimizer's state and its step are the host's."""

    keep_whole_below: int = 100_000
    """With stage 3, weights with fewer values than this stay whole on every rank."""

    def __post_init__(self) -> None:
        check_types(self, "deepspeed.")
        if self.keep_whole_below < 0:
            raise UsageError(
                f"deepspeed.keep_whole_below is {self.keep_whole_below}; it must be 0 or more"
            )


def check_deepspeed(parallel: ParallelConfig, backend: str) -> None:
    """Raise UsageError, naming the setting, if a run is not data parallel alone."""
    for name in ("tensor", "pipeline", "context"):
        degree = getattr(parallel, name)
        if degree > 1:
            raise UsageError(
                f"engine deepspeed is data parallel alone, and parallel.{name} is {degree}: set it"
                " to 1, or engine to megatron"
            )
    for name in ("overlap_gradients", "overlap_parameters"):
        if getattr(parallel, name):
            raise UsageError(
                f"parallel.{name} is for engine megatron; deepspeed overlaps by itself"
            )
    if backend != "torch":
        raise UsageError(f"engine deepspeed takes backend torch, not {backend}")
