"""How a run is split over ranks."""

from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "interleave"):
            if getattr(self, name) < 1:
                raise UsageError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        if self.interleave > 1 and self.pipeline == 1:
            raise UsageError("parallel.interleave needs parallel.pipeline of at least 2")

    def check_length(self, context_length: int) -> None:
        """Raise UsageError if sequences of `context_length` tokens cannot be split."""
        if self.sequence and context_length % self.tensor:
            raise UsageError(
                f"parallel.sequence needs a context_length that parallel.tensor {self.tensor}"
                f" divides, not {context_length}"
            )

    def data(self, world_size: int) -> int:
        """Data-parallel replicas among `world_size` ranks."""
        ranks = self.tensor * self.pipeline
        if world_size % ranks:
            raise UsageError(
                f"parallel.tensor {self.tensor} x parallel.pipeline {self.pipeline} does not divide"
                f" the {world_size} ranks; start a multiple of {ranks} ranks"
            )
        return world_size // ranks
