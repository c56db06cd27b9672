"""Megatron's data-parallel wrapper and optimizer around the model's chunks."""

from collections.abc import Collection, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as EngineOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from torch import nn

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import part_of_model
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.adam import Adam
from megatron_jam.parallel.world import World
from megatron_jam.training.moments import members

CLIP_EPSILON = 1e-6
"""Added to a norm before it is compared, as by torch and Megatron-Core."""


class _OnlyReplica(DistributedDataParallel):
    """Has all weights, however they are updated."""

    def start_param_sync(self, *_: object, **__: object) -> None:
        """Nothing is to be had of others; gloo would copy the whole buffer, more than once."""


def wrap_chunks(
    chunks: Sequence[JamModel],
    world: World,
    *,
    distributed_optimizer: bool = True,
    bucket_size: int | None = None,
) -> list[DistributedDataParallel]:
    """Wrap chunks so that gradients are summed over replicas and tied tables over stages.

    Gradients are sums over the global batch's counted tokens; `update` divides them.

    Args:
        chunks: this rank's model.
        world: the ranks.
        distributed_optimizer: whether each replica updates its own share of the weights.
        bucket_size: weights whose gradients are summed at once where that overlaps the backward
            pass; Megatron's default is 40 million, or a million for each replica.
    """
    for chunk in chunks:
        holders(chunk)  # marks the parameters for Megatron
        chunk.config.finalize_model_grads_func = partial(_finalize, world=world)
    parallel = world.parallel
    overlaps = parallel.overlap_gradients and world.replicas.size > 1
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps and distributed_optimizer and parallel.overlap_parameters,
        bucket_size=bucket_size,
        grad_reduce_in_fp32=chunks[0].config.params_dtype is torch.bfloat16,
    )
    kind = DistributedDataParallel if world.replicas.size > 1 else _OnlyReplica
    wrapped = [kind(chunk.config, settings, chunk, pg_collection=world.groups) for chunk in chunks]
    if overlaps:
        (only,) = wrapped  # stages, and so chunks, are refused by ParallelConfig
        only.module.config.no_sync_func = only.no_sync
    return wrapped


def finish_weights(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Wait until the last update has reached this rank's weights; before they are read by anything
    but the forward pass. All ranks take part."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    wrapped: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    distributed_optimizer: bool = True,
) -> MegatronOptimizer:
    """AdamW whose state is split over the replicas; vectors and biases are not decayed.

    Raises:
        UsageError: a learning-rate factor is for a part that the model lacks.
    """
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
    optimizer = get_megatron_optimizer(
        engine,
        list(wrapped),
        config_overrides=_overrides(wrapped, config.factors.changed()),
        use_gloo_process_groups=False,
    )
    # Megatron leaves the multiple to its scheduler, which nothing here uses.
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    for each in members(optimizer):
        if not each.is_stub_optimizer:
            # Else a run that has not made a step yet could not be saved.
            each.init_state_fn(each.optimizer, each.config)
            for group in each.optimizer.param_groups:
                group.setdefault("step", 0)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the rate of the next step, times its factor for each group of weights."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]


@torch.no_grad()
def update(optimizer: MegatronOptimizer, norm: float, num_tokens: float) -> None:
    """Change the weights: what is left of Megatron's `step` after `prepare_grads`.

    Args:
        optimizer: has gradients that are sums over tokens.
        norm: of their mean over tokens, before it is clipped.
        num_tokens: of the global batch.
    """
    for each in members(optimizer):
        if each.is_stub_optimizer:
            continue
        clip_norm = each.config.clip_grad
        divisor = num_tokens * max(1.0, (norm + CLIP_EPSILON) / clip_norm if clip_norm else 1.0)
        if isinstance(each.optimizer, Adam):
            each.optimizer.divisor = divisor  # within its own pass over them
        else:
            for one in each.get_parameters():
                if one.grad is not None:
                    one.grad /= divisor
    optimizer.step_with_ready_grads()


def check_factors(factors: Collection[str], model: ModelConfig) -> None:
    """Raise UsageError if a learning-rate factor is for a part that the model lacks."""
    for part in factors:
        if part not in model.parts:
            raise UsageError(
                f"optimizer.factors.{part} is for a part that the model lacks; it has"
                f" {', '.join(model.parts)}"
            )


class PartNorms:
    """Norms of the parts of a gradient: each tower, bridges, embeddings, head. They make its whole
    norm, which is then measured in the same pass."""

    def __init__(
        self, chunks: Sequence[JamModel], optimizer: MegatronOptimizer, world: World
    ) -> None:
        """Find what this rank holds of each part."""
        self._optimizer, self._device = optimizer, world.device
        self._parts = chunks[0].model_config.parts
        self._held: list[tuple[int, nn.Parameter]] = []
        """Number of the part, and what the optimizer updates."""
        for chunk in chunks:
            for holder in holders(chunk):
                repeats = holder.split is None and world.tensor.rank > 0
                if not repeats and not getattr(holder.parameter, "shared", False):
                    part = self._parts.index(part_of_model(holder.parts[0]))
                    self._held += [(part, each) for each in _updated(optimizer, holder.parameter)]

    @torch.no_grad()
    def __call__(self, messages: torch.Tensor | None = None) -> dict[str, float]:
        """Between the optimizer's `prepare_grads` and the clipping: norms of the gradient's parts,
        without those that do not learn; all ranks take part.

        Args:
            messages: float64 [n] on the ranks' device, which becomes its sum over all of them in
                the same exchange; for the distributed optimizer, whose norms take all ranks.
        """
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=self._device)
        held = [(part, each.grad) for part, each in self._held if each.grad is not None]
        if held:
            norms = torch.stack(torch._foreach_norm([gradient for _, gradient in held]))
            numbers = torch.tensor([part for part, _ in held], device=self._device)
            squares.index_add_(0, numbers, norms.double() ** 2)
        group = self._group()
        if messages is None:
            messages = squares.new_empty(0)
        assert not len(messages) or dist.get_world_size(group) == dist.get_world_size()
        together = torch.cat([squares, messages])
        dist.all_reduce(together, group=group)
        squares, summed = together.split([len(squares), len(messages)])
        messages.copy_(summed)
        values = squares.sqrt().tolist()
        return {name: value for name, value in zip(self._parts, values, strict=True) if value}

    def _group(self) -> dist.ProcessGroup:
        return members(self._optimizer)[0].get_grad_stats_parallel_group()


def _updated(optimizer: MegatronOptimizer, weight: nn.Parameter) -> list[nn.Parameter]:
    """What the optimizer updates in place of a weight: this replica's stretch of it, an fp32 copy,
    or itself; nothing where another replica does or the weight does not learn."""
    if not weight.requires_grad:
        return []
    for each in members(optimizer):
        places = getattr(each, "model_param_group_index_map", None)
        if places is not None:
            if weight not in places:
                continue
            group, index = places[weight]
            return [each.optimizer.param_groups[group]["params"][index]]
        return [getattr(weight, "main_param", weight)]
    return []


def _overrides(
    wrapped: Sequence[DistributedDataParallel], factors: dict[str, float]
) -> dict | None:
    """Megatron's settings by weight for the factors that are not 1; None for its defaults."""
    if not factors:
        return None
    check_factors(factors, wrapped[0].module.model_config)
    for chunk in wrapped:
        for holder in holders(chunk.module):
            holder.parameter.part_of_model = part_of_model(holder.parts[0])
    is_vector = ParamPredicate(name="is_vector", fn=lambda weight: weight.dim() == 1)
    overrides: dict = {ParamKey(name="*.bias", predicate=is_vector): {"wd_mult": 0.0}}
    for part, factor in factors.items():
        belongs = ParamPredicate(name=part, fn=lambda weight, p=part: weight.part_of_model == p)
        overrides[ParamKey(predicate=belongs)] = {"lr_mult": factor}
    return overrides


def _finalize(
    wrapped: list[DistributedDataParallel], *_: object, world: World, **__: object
) -> None:
    """Sum tied tables over the stages that hold them, then let Megatron do its reductions; without
    the number of tokens, by which it would divide in a pass of its own.

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
    finalize_model_grads(wrapped, pg_collection=world.groups, force_all_reduce=alone)
