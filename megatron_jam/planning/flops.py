"""FLOPs a token of a model, and of each pipeline stage: the one formula behind TFLOP/s and MFU.

A multiply-add is two FLOPs, and matrix products alone count. Of one token's forward pass:

    2 x the weights of all matrices of towers' layers, bridges and projections
  + 2 x 2 x d x (tokens read) for each attention of a tower or a bridge of width d
  + 2 x d x V for the output rows, of which each is read once

where a token reads (n + 1) / 2 tokens of a context of n (causal, the headline) or all n (full, as
torch's FlopCounterMode counts, and as papers before FlashAttention did). The backward pass makes
two products for each one of the forward pass, and one where the matrix is frozen. What
recomputation adds is not work on the model and not counted.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.cost import Attention, embedding_flops, head_flops, layer_flops
from megatron_jam.models.parameters import learns, parameter_table
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

    frozen: int = 0
    """Of the layers' matrices whose weights do not learn, which have no gradients of weights."""

    @property
    def forward(self) -> int:
        """All of them."""
        return self.layers + self.bridges + self.outside

    @property
    def training(self) -> int:
        """Forward and backward pass."""
        return 3 * self.forward - self.frozen


def stage_flops(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    context_length: int,
    attention: Attention = "causal",
    frozen: Collection[str] = (),
) -> list[Flops]:
    """FLOPs a token of each pipeline stage, over its tensor-parallel ranks together.

    Args:
        model: towers, bridges, head.
        parallel: layout; its `pipeline`, `interleave` and `balance` matter.
        context_length: tokens that attention runs over.
        attention: how its scores count.
        frozen: towers whose parent's weights do not learn.

    Raises:
        UsageError: if there are more chunks of layers than layers.
    """
    layers = layer_flops(model, context_length, attention)
    still = [0] * model.num_layers
    for entry in parameter_table(model):
        if entry.layer is not None and len(entry.shape) == 2 and not learns(entry, frozen):
            still[entry.layer] += 2 * math.prod(entry.shape)
    stages = []
    for stage in range(parallel.pipeline):
        held = [
            layer
            for chunk in range(parallel.interleave)
            for layer in stage_layers(model, parallel, stage=stage, chunk=chunk)
        ]
        in_front = embedding_flops(model) if stage == 0 else 0
        behind = head_flops(model) if stage == parallel.pipeline - 1 else 0
        stages.append(
            Flops(
                layers=sum(layers[layer][0] for layer in held),
                bridges=sum(layers[layer][1] for layer in held),
                outside=in_front + behind,
                frozen=sum(still[layer] for layer in held),
            )
        )
    return stages


def model_flops(
    model: ModelConfig,
    *,
    context_length: int,
    attention: Attention = "causal",
    frozen: Collection[str] = (),
) -> Flops:
    """FLOPs a token of a whole model; arguments as of `stage_flops`."""
    settings = {"context_length": context_length, "attention": attention, "frozen": frozen}
    return stage_flops(model, ParallelConfig(), **settings)[0]
