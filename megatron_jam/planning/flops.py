"""FLOPs a token of a model, and of each pipeline stage."""

from dataclasses import dataclass

from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.cost import embedding_flops, head_flops, layer_flops
from megatron_jam.models.stages import stage_layers


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs a token; a multiply-add is two."""

    layers: int
    """Of the towers' layers."""

    bridges: int
    """Of the bridges."""

    outside: int
    """Of the head, and of projections behind a shared token table."""

    @property
    def forward(self) -> int:
        """All of them."""
        return self.layers + self.bridges + self.outside

    @property
    def training(self) -> int:
        """Forward and backward pass, which is two products for each one of the forward pass; what
        recomputation adds is not work on the model and not counted."""
        return 3 * self.forward


def stage_flops(
    model: ModelConfig, parallel: ParallelConfig, *, context_length: int
) -> list[Flops]:
    """FLOPs a token of each pipeline stage, over its tensor-parallel ranks together.

    Args:
        model: towers, bridges, head.
        parallel: layout; its `pipeline`, `interleave` and `balance` matter.
        context_length: tokens that causal attention runs over.

    Raises:
        UsageError: if there are more chunks of layers than layers.
    """
    layers = layer_flops(model, context_length)
    stages = []
    for stage in range(parallel.pipeline):
        held = [
            layers[layer]
            for chunk in range(parallel.interleave)
            for layer in stage_layers(model, parallel, stage=stage, chunk=chunk)
        ]
        in_front = embedding_flops(model) if stage == 0 else 0
        behind = head_flops(model) if stage == parallel.pipeline - 1 else 0
        stages.append(
            Flops(
                layers=sum(towers for towers, _ in held),
                bridges=sum(bridges for _, bridges in held),
                outside=in_front + behind,
            )
        )
    return stages


def model_flops(model: ModelConfig, *, context_length: int) -> Flops:
    """FLOPs a token of a whole model; arguments as of `stage_flops`."""
    return stage_flops(model, ParallelConfig(), context_length=context_length)[0]
