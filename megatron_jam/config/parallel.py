"""How a run is split over ranks."""

from dataclasses import dataclass
from typing import Literal

from megatron_jam.config.checks import check_types
from megatron_jam.config.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; data parallelism takes the ranks that are left."""

    tensor: int = 1
    """Ranks that share each layer (TP)."""

    pipeline: int = 1
    """Stages that share the layers (PP)."""

    interleave: int = 1
    """Chunks of layers a pipeline stage holds (virtual pipeline)."""

    sequence: bool = False
    """Split norms and residuals over the tensor-parallel ranks by sequence position."""

    balance: Literal["layers", "cost"] = "layers"
    """How layers go to stages: as many to each, or so that the costliest stage costs least, with
    bridges and the head counted (see models/stages.py)."""

    context: int = 1
    """Ranks that share each sequence (CP), with Transformer Engine's layers alone."""

    overlap_gradients: bool = False
    """Sum gradients over the replicas during the backward pass, bucket by bucket, not behind it.
    Not with pipeline stages: their tied tables are summed first."""

    overlap_parameters: bool = False
    """Gather updated weights from the replicas during the next forward pass; needs
    overlap_gradients."""

    def __post_init__(self) -> None:
        check_types(self, "parallel.")
        for name in ("tensor", "pipeline", "interleave", "context"):
            if getattr(self, name) < 1:
                raise UsageError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        if self.sequence and self.tensor == 1:
            raise UsageError("parallel.sequence needs parallel.tensor of at least 2")
        if self.overlap_parameters and not self.overlap_gradients:
            raise UsageError("parallel.overlap_parameters needs parallel.overlap_gradients")
        if self.overlap_gradients and self.pipeline > 1:
            raise UsageError(
                f"parallel.overlap_gradients needs parallel.pipeline of 1, not {self.pipeline}:"
                " with stages the copies of a tied table are summed before the replicas' gradients"
            )
        if self.interleave > 1 and self.pipeline == 1:
            raise UsageError("parallel.interleave needs parallel.pipeline of at least 2")

    def check_length(self, context_length: int) -> None:
        """Raise UsageError if sequences of `context_length` tokens cannot be split."""
        if self.context > 1 and context_length % (2 * self.context):
            raise UsageError(
                f"parallel.context {self.context} needs a context_length that"
                f" {2 * self.context} divides, not {context_length}"
            )
        if self.sequence and context_length // self.context % self.tensor:
            raise UsageError(
                f"parallel.sequence needs a context_length that parallel.tensor {self.tensor}"
                f" divides{' within a rank of parallel.context' if self.context > 1 else ''},"
                f" not {context_length}"
            )

    def check_micro_batches(self, count: int) -> None:
        """Raise UsageError if the schedule cannot take `count` micro-batches of a step."""
        if self.interleave > 1 and count % self.pipeline:
            raise UsageError(
                f"with parallel.interleave the {count} micro-batches of a step must be a multiple"
                f" of parallel.pipeline {self.pipeline}"
            )

    def check_backend(self, backend: str) -> None:
        """Raise UsageError if layers of `backend` cannot be split so."""
        if self.context > 1 and backend != "transformer_engine":
            raise UsageError(
                f"parallel.context is {self.context}, but only training with `backend:"
                " transformer_engine` has attention over several ranks; set it to 1"
            )

    def data(self, world_size: int) -> int:
        """Data-parallel replicas among `world_size` ranks."""
        ranks = self.tensor * self.pipeline * self.context
        if world_size % ranks:
            context = f" x parallel.context {self.context}" if self.context > 1 else ""
            raise UsageError(
                f"parallel.tensor {self.tensor} x parallel.pipeline {self.pipeline}{context} does"
                f" not divide the {world_size} ranks; start a multiple of {ranks} ranks"
            )
        return world_size // ranks
