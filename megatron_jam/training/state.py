"""A run's tensors under global names: what Megatron's dist_checkpointing saves and loads.

Every tensor has one global name, so any TP x PP x DP reads what another one wrote.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
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
from megatron_jam.parallel.world import World

# The only layout of the optimizer's state that any TP x PP x DP can load.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(
    chunks: Sequence[JamModel], optimizer: MegatronOptimizer, world: World, *, is_loading: bool
) -> dict[str, Any]:
    """Model and optimizer of this rank by global names; all ranks take part.

    To save, the replicas' shares of the optimizer's state are gathered on the first of them.
    """
    model = {}
    for chunk in chunks:
        for holder in holders(chunk):
            model[_local_key(holder)] = sharded(holder, world)
    state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE)
    return {"model": model, "optimizer": state}


@torch.no_grad()
def take_state(
    chunks: Sequence[JamModel], optimizer: MegatronOptimizer, loaded: Mapping[str, Any]
) -> None:
    """Put what was loaded for `sharded_state` into model and optimizer."""
    for chunk in chunks:
        for holder in holders(chunk):
            holder.parameter.copy_(loaded["model"][_local_key(holder)])
    optimizer.load_state_dict(loaded["optimizer"])


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
