"""What is checked before the first step, so that a run starts right or not at all."""

import json
from collections.abc import Mapping, Sequence
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


class CopiesDiffer(Exception):
    """Copies of a weight are not equal; raised on all ranks, and nothing is saved."""


def check_replicas(chunks: Sequence[JamModel], world: World, step: int = 0) -> None:
    """Compare copies of each weight after `step`: over the replicas, over the tensor-parallel ranks
    where it is not split, and of tied tables over their stages; all ranks take part.

    Raises:
        CopiesDiffer: the message names the first weight and the ranks that stand apart.
    """
    held = [holder for chunk in chunks for holder in holders(chunk)]
    sums = {id(each.parameter): _checksum(each.parameter) for each in held}
    keys = {id(each.parameter): each.key for each in held}
    tied = [weight for chunk in chunks for weight in chunk.tied_weights()]
    found = [
        _differing(world.replicas.group, [each.parameter for each in held], sums, keys),
        _differing(
            world.tensor.group, [each.parameter for each in held if each.split is None], sums, keys
        ),
        _differing(world.groups.embd, tied, sums, keys) if tied else "",
    ]
    what = next(filter(None, found), "")
    differs = torch.tensor(int(bool(what)), device=world.device)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if int(differs):
        raise CopiesDiffer(f"after step {step}: {what or 'copies of a weight on other ranks'}")


def log_start(chunks: Sequence[JamModel], world: World, *, backend: str, engine: str) -> None:
    """Say how large the model is, how it is split, and which fused kernels are in use."""
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
    logger.info("%s", describe_parts(fused_parts(world.device, backend, engine)))


def save_environment(path: Path, world: World, *, backend: str, engine: str) -> None:
    """Write versions and the fused kernels in use as JSON, beside the run's settings."""
    text = json.dumps(environment(world.device, backend, engine), indent=2)
    write_text_atomically(path, text + "\n")


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums over a tensor's bytes, int64 [2]; the second knows their places."""
    found = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(tensor.detach().reshape(-1).split(1 << 22)):
        bits = part.contiguous().view(torch.uint8).to(torch.int64)
        weights = torch.arange(bits.numel(), device=bits.device) % 65521 + 1 + number
        found += torch.stack([bits.sum(), (bits * weights).sum()])
    return found


def _differing(
    group: dist.ProcessGroup,
    weights: Sequence[torch.Tensor],
    sums: Mapping[int, torch.Tensor],
    keys: Mapping[int, str],
) -> str:
    """The first of `weights` that is not the same on all ranks of `group`, and where."""
    if dist.get_world_size(group) == 1 or not weights:
        return ""
    mine = torch.stack([sums[id(each)] for each in weights])
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    wrong = (low != high).any(dim=1).nonzero()
    if not len(wrong):
        return ""
    number = int(wrong[0])
    everywhere = [torch.empty_like(mine[number]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, mine[number].clone(), group=group)
    values = [tuple(each.tolist()) for each in everywhere]
    usual = max(values, key=values.count)
    ranks = dist.get_process_group_ranks(group)
    apart = [rank for rank, value in zip(ranks, values, strict=True) if value != usual]
    return (
        f"{keys[id(weights[number])]} on rank(s) {apart} is not what it is on the others of {ranks}"
    )
