"""Megatron's data-parallel wrapper and optimizer around the model's chunks."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as EngineOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_jam.config.run import OptimizerConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.world import World


def wrap_chunks(
    chunks: Sequence[JamModel], world: World, *, distributed_optimizer: bool = True
) -> list[DistributedDataParallel]:
    """Wrap chunks so that gradients are summed over replicas and tied tables over stages.

    Gradients are sums over tokens until they are divided by the global number of counted tokens.
    """
    for chunk in chunks:
        holders(chunk)  # marks the parameters for Megatron
        chunk.config.finalize_model_grads_func = partial(_finalize, world=world)
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=False,
        grad_reduce_in_fp32=chunks[0].config.params_dtype is torch.bfloat16,
    )
    return [
        DistributedDataParallel(chunk.config, settings, chunk, pg_collection=world.groups)
        for chunk in chunks
    ]


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    distributed_optimizer: bool = True,
) -> MegatronOptimizer:
    """AdamW whose state is split over the replicas; vectors and biases are not decayed."""
    dtype = wrapped[0].module.config.params_dtype
    engine = EngineOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_norm,
        use_distributed_optimizer=distributed_optimizer,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
    )
    return get_megatron_optimizer(engine, list(wrapped), use_gloo_process_groups=False)


def _finalize(
    wrapped: list[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    *,
    world: World,
    **_: object,
) -> None:
    """Sum tied tables over the stages that hold them, then let Megatron do its reductions.

    Before the replicas' reduction, so that Megatron need not keep each tied table in a bucket of
    its own: it resumes wrongly from several buckets if one of them is padded.
    """
    for chunk in wrapped:
        for weight in chunk.module.tied_weights():
            if not weight.requires_grad:
                continue  # frozen, on both stages
            dist.all_reduce(weight.main_grad, group=world.groups.embd)
    # A scatter to a single replica would copy the whole buffer, more than once on a CPU.
    alone = world.replicas.size == 1
    finalize_model_grads(wrapped, num_tokens, pg_collection=world.groups, force_all_reduce=alone)
