"""What worker processes run in the tests of models and training."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_jam.config.run import OptimizerConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import parameter_table
from megatron_jam.models.sharding import logical_gradients
from megatron_jam.parallel.world import World
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.step import ForwardBackward, train_step
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import gather_whole, load_weights


def build(folder: WeightsFolder, world: World, dtype: torch.dtype, **kwargs: Any) -> list[JamModel]:
    """All chunks of this rank with the folder's weights."""
    chunks = [
        JamModel(folder.config, world, dtype=dtype, chunk=i, **kwargs)
        for i in range(world.parallel.interleave)
    ]
    load_weights(chunks, folder, world)
    return chunks


def random_batch(vocab_size: int, *, samples: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, labels and a mask that leaves out an uneven part of each sample."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, vocab_size, (samples, length + 1), generator=g)
    mask = (torch.rand(samples, length, generator=g) > 0.3).float()
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": mask,
        "positions": torch.arange(length).expand(samples, -1).contiguous(),
    }


def split_batch(batch: dict[str, Tensor], world: World, micro: int) -> list[dict[str, Tensor]]:
    """This replica's micro-batches."""
    mine = {k: v.chunk(world.data.size)[world.data.rank] for k, v in batch.items()}
    count = mine["tokens"].shape[0] // micro
    return [{k: v.chunk(count)[i] for k, v in mine.items()} for i in range(count)]


def loss_and_gradients(
    world: World,
    path: Path,
    batch: dict[str, Tensor],
    dtype: torch.dtype,
    recompute: str = "none",
    micro: int = 1,
    sharded: bool = False,
    **settings: Any,
) -> tuple[float, dict[str, Tensor]] | None:
    """Mean loss and every whole gradient, on rank 0; `settings` are JamModel's, and `sharded` is
    whether the optimizer would be the distributed one."""
    folder = WeightsFolder(path)
    chunks = build(folder, world, dtype, recompute=recompute, **settings)
    wrapped = wrap_chunks(chunks, world, distributed_optimizer=sharded)
    losses = ForwardBackward(wrapped, world, folder.vocabulary)(split_batch(batch, world, micro))
    if sharded:
        _gather_shards(wrapped, world)
    local: dict[str, Tensor] = {}
    for chunk in chunks:
        local.update(logical_gradients(chunk, lambda p: p.main_grad))
    table = parameter_table(folder.config)
    whole = {name: grad for name, grad in gather_whole(table, local, world, dtype)}
    whole = {name: sums / losses.num_tokens for name, sums in whole.items() if sums is not None}
    return (losses.mean, whole) if world.rank == 0 else None


def _gather_shards(wrapped: list[DistributedDataParallel], world: World) -> None:
    """For a distributed optimizer each replica has the sums of its own stretch of gradients."""
    for bucket in (b for each in wrapped for group in each.bucket_groups for b in group.buckets):
        stretches = list(bucket.grad_data.view(world.replicas.size, -1))
        own = stretches[world.replicas.rank].clone()
        dist.all_gather(stretches, own, group=world.replicas.group)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest ||a - b|| / (||a|| + 1e-3 ||all a||) over the logical tensors."""
    everything = torch.stack([t.norm() for t in one.values()]).norm()
    assert one.keys() == other.keys()
    return max(
        float((other[n] - t).norm() / (t.norm() + 1e-3 * everything)) for n, t in one.items()
    )


@torch.no_grad()
def whole_logits(
    world: World, path: Path, tokens: Tensor, dtype: torch.dtype, **settings: Any
) -> Tensor:
    """Logits [B, S, V] of tokens [B, S], on one rank; `settings` are JamModel's."""
    folder = WeightsFolder(path)
    (model,) = build(folder, world, dtype, **settings)
    tokens = tokens.to(world.device)
    positions = torch.arange(tokens.shape[1], device=world.device).expand_as(tokens)
    return model(tokens, positions).transpose(0, 1)


def train_steps(
    world: World, path: Path, batches: list[dict[str, Tensor]], dtype: torch.dtype, sharded: bool
) -> tuple[list[float], dict[str, Tensor]] | None:
    """Losses of some optimizer steps and the weights after them, on rank 0."""
    folder = WeightsFolder(path)
    chunks = build(folder, world, dtype)
    wrapped = wrap_chunks(chunks, world, distributed_optimizer=sharded)
    # Adam turns the noise of tiny gradients into full steps unless epsilon is above it.
    settings = OptimizerConfig(learning_rate=1e-2, epsilon=1e-4, clip_norm=0.5)
    optimizer = build_optimizer(wrapped, settings, distributed_optimizer=sharded)
    step = ForwardBackward(wrapped, world, folder.vocabulary)
    losses = []
    for batch in batches:
        micro_batches = split_batch(batch, world, 1)
        result = train_step(step, optimizer, micro_batches, settings.learning_rate)
        assert result.grad_norm > settings.clip_norm, "nothing to clip"
        losses.append(result.losses.mean)
    local: dict[str, Tensor] = {}
    for chunk in chunks:
        local.update(logical_gradients(chunk, lambda p: p.detach()))
    table = parameter_table(folder.config)
    whole = {name: value for name, value in gather_whole(table, local, world, dtype)}
    return (losses, whole) if world.rank == 0 else None
