"""A run's tensors under global names: what Megatron's dist_checkpointing saves and loads.

Every tensor has one global name, so any TP x PP x DP reads what another one wrote.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

from megatron_jam.models.jam import JamModel
from megatron_jam.models.sharding import Holder, holders
from megatron_jam.parallel.versions import match_groups
from megatron_jam.parallel.world import World
from megatron_jam.training.moments import (
    Share,
    empty_states,
    find_shares,
    take_states,
    whole_states,
)

STATE = "optimizer.state"
"""What the names of the optimizer's tensors begin with, as in Megatron's own checkpoints."""


def sharded_state(
    chunks: Sequence[JamModel], optimizer: MegatronOptimizer, world: World, *, is_loading: bool
) -> dict[str, Any]:
    """Model and optimizer of this rank by global names; all ranks take part.

    To save, each weight and its moments are one replica's; to load, each replica asks for whole
    weights, and for the moments of those of which it updates a part.
    """
    shares = find_shares(optimizer, world.replicas)
    model = {}
    for number, holder in enumerate(_held(chunks)):
        share = shares.get(id(holder.parameter))
        writer = share.owner if share else number % world.replicas.size
        replica = int(writer != world.replicas.rank)
        model[_local_key(holder)] = sharded(holder, world, replica=replica)
    learning = _learning(chunks, shares)
    if is_loading:
        states = empty_states([share for _, share in learning])
    else:
        # Of a tied table one stage writes the moments, too.
        learning = [(holder, share) for holder, share in learning if not holder.is_copy]
        states = whole_states([share for _, share in learning], world.replicas)
    moments = {}
    for (holder, share), state in zip(learning, states, strict=True):
        for kind, value in state.items():
            name, replica = f"{STATE}.{kind}.", int(not share.is_owner)
            held = replace(holder, parameter=value, key=name + holder.key)
            moments[name + _local_key(holder)] = sharded(held, world, replica=replica)
    described = {**optimizer.state_dict(), "param_state_sharding_type": "fully_reshardable"}
    state = {"model": model, "optimizer": described}
    return {**state, "moments": moments} if moments else state


@torch.no_grad()
def take_state(
    chunks: Sequence[JamModel],
    optimizer: MegatronOptimizer,
    loaded: Mapping[str, Any],
    world: World,
) -> None:
    """Put what was loaded for `sharded_state` into model and optimizer."""
    for holder in _held(chunks):
        value = loaded["model"][_local_key(holder)]
        if value.data_ptr() != holder.parameter.data_ptr():
            holder.parameter.copy_(value)
    match_groups(loaded["optimizer"], optimizer)
    optimizer.load_state_dict(loaded["optimizer"])
    shares = find_shares(optimizer, world.replicas)
    for holder, share in _learning(chunks, shares):
        keys = {kind: f"{STATE}.{kind}.{_local_key(holder)}" for kind in share.tensors}
        take_states(share, {kind: loaded["moments"][key] for kind, key in keys.items()})


def _held(chunks: Sequence[JamModel]) -> list[Holder]:
    return [holder for chunk in chunks for holder in holders(chunk)]


def _learning(
    chunks: Sequence[JamModel], shares: Mapping[int, Share]
) -> list[tuple[Holder, Share]]:
    found = ((each, shares.get(id(each.parameter))) for each in _held(chunks))
    return [(holder, share) for holder, share in found if share is not None]


def unshare(state: dict[str, Any]) -> None:
    """Give tensors that are to be saved storages of their own, over the same memory.

    Megatron copies what is part of a larger storage, as weights in a buffer are, before it forks.
    That is needless: what the fork sees of memory stays as it is.
    """
    apply_factories(state)
    for each in _sharded_parts(state):
        if isinstance(each.data, torch.Tensor):
            each.data = _alone(each.data)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    memory = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)


def bytes_to_write(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors that this rank alone writes."""
    return sum(
        each.data.nbytes
        for each in _sharded_parts(state)
        if each.data is not None and is_main_replica(each.replica_id)
    )


def _sharded_parts(value: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(value, ShardedTensor | ShardedTensorFactory):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _sharded_parts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _sharded_parts(each)


def _local_key(holder: Holder) -> str:
    return f"{holder.key} (copy)" if holder.is_copy else holder.key


def sharded(
    holder: Holder, world: World, *, replica: int | None = None
) -> ShardedTensor | ShardedTensorFactory:
    """A parameter's place in the whole model; the first stage's copy of a tied table is saved.

    Args:
        holder: the parameter.
        world: the ranks.
        replica: this rank's place among those that hold the same; by default that among replicas.
            Number 0 saves.
    """
    groups = {"tp_group": world.groups.tp, "dp_cp_group": world.groups.dp_cp}
    copy = int(holder.is_copy)
    replica = world.replicas.rank if replica is None else replica
    if holder.split is None:
        place = (copy, world.tensor.rank, replica)
        return make_sharded_tensor_for_checkpoint(
            holder.parameter, holder.key, replica_id=place, **groups
        )
    part = make_tp_sharded_tensor_for_checkpoint(
        holder.parameter,
        holder.key,
        holder.split,
        replica_id=(copy, 0, replica),
        # Another TP pads the vocabulary differently.
        allow_shape_mismatch=holder.parts[0].is_vocabulary,
        **groups,
    )
    if len(holder.parts) == 1 or holder.parts[0].unit:
        return part
    # A rank holds its rows of the gate, then its rows of fc1: two places in the whole tensor.
    return apply_swiglu_sharded_factory(part, ())
