"""What is checked before the first step, so that a run starts right or not at all."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_jam.config.log import logger
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import num_parameters
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.world import World


def check_replicas(chunks: Sequence[JamModel], world: World) -> None:
    """Raise RuntimeError unless copies of a weight have equal checksums: over the replicas, over
    the tensor-parallel ranks where it is not split, and of tied tables over their stages."""
    for chunk in chunks:
        for holder in holders(chunk):
            _check_equal(holder.parameter, world.data.group, f"replicas of {holder.key}")
            if holder.split is None:
                _check_equal(holder.parameter, world.tensor.group, f"copies of {holder.key}")
        for weight in chunk.tied_weights():
            _check_equal(weight, world.groups.embd, "first and last stage's token tables")


def log_start(chunks: Sequence[JamModel], world: World) -> None:
    """Say how large the model is, how it is split and what a rank's state will take."""
    parallel = world.parallel
    logger.info(
        "%s parameters | %d ranks: TP %d x PP %d x DP %d%s | %s",
        f"{num_parameters(chunks[0].model_config):,}",
        world.size,
        parallel.tensor,
        parallel.pipeline,
        world.data.size,
        ", sequence parallel" if parallel.sequence else "",
        world.device,
    )
    logger.info(
        "weights, gradients and optimizer: %.1f MB a rank", state_bytes(chunks, world) / 1e6
    )


def state_bytes(chunks: Sequence[JamModel], world: World) -> int:
    """Bytes of weights, gradients and Adam's state on this rank, before activations.

    Gradients are fp32 for bf16 weights; the fp32 copy and two moments are split over the replicas.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    total = 0
    for parameter in parameters:
        low = parameter.dtype in (torch.bfloat16, torch.float16)
        state = 12 if low else 8
        total += parameter.numel() * (parameter.dtype.itemsize + 4)
        total += parameter.numel() * state // world.data.size
    return total


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
