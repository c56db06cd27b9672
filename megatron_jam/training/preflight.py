"""What is checked before the first step, so that a run starts right or not at all."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import num_parameters
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.fused import describe_parts, environment, fused_parts
from megatron_jam.parallel.world import World
from megatron_jam.planning.memory import state_bytes


def check_replicas(chunks: Sequence[JamModel], world: World) -> None:
    """Raise RuntimeError unless copies of a weight have equal checksums: over the replicas, over
    the tensor-parallel ranks where it is not split, and of tied tables over their stages."""
    for chunk in chunks:
        for holder in holders(chunk):
            _check_equal(holder.parameter, world.replicas.group, f"replicas of {holder.key}")
            if holder.split is None:
                _check_equal(holder.parameter, world.tensor.group, f"copies of {holder.key}")
        for weight in chunk.tied_weights():
            _check_equal(weight, world.groups.embd, "first and last stage's token tables")


def log_start(chunks: Sequence[JamModel], world: World, *, backend: str = "torch") -> None:
    """Say how large the model is, how it is split, what a rank's state will take, and which fused
    kernels are in use."""
    parallel = world.parallel
    logger.info(
        "%s parameters | %d ranks: TP %d x PP %d x DP %d%s%s | %s",
        f"{num_parameters(chunks[0].model_config):,}",
        world.size,
        parallel.tensor,
        parallel.pipeline,
        world.data.size,
        f" x CP {parallel.context}" if parallel.context > 1 else "",
        ", sequence parallel" if parallel.sequence else "",
        world.device,
    )
    held = [parameter for chunk in chunks for parameter in chunk.parameters()]
    width = chunks[0].config.params_dtype.itemsize
    state = state_bytes(
        sum(each.numel() for each in held),
        num_frozen=sum(each.numel() for each in held if not each.requires_grad),
        width=width,
        replicas=world.replicas.size,
    )
    logger.info("weights, gradients and optimizer: %.1f MB a rank", state.total / 1e6)
    logger.info("%s", describe_parts(fused_parts(world.device, backend)))


def save_environment(path: Path, world: World, *, backend: str) -> None:
    """Write versions and the fused kernels in use as JSON, beside the run's settings."""
    text = json.dumps(environment(world.device, backend), indent=2)
    write_text_atomically(path, text + "\n")


def _check_equal(tensor: torch.Tensor, group: dist.ProcessGroup, what: str) -> None:
    if dist.get_world_size(group) == 1:
        return
    local = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(tensor.detach().reshape(-1).split(1 << 22)):
        bits = part.contiguous().view(torch.uint8).to(torch.int64)
        weights = torch.arange(bits.numel(), device=bits.device) % 65521 + 1 + number
        local += torch.stack([bits.sum(), (bits * weights).sum()])
    low, high = local.clone(), local.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(low, high):
        raise RuntimeError(f"{what} differ before the first step")
