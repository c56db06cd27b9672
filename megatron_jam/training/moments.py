"""The distributed optimizer's state, saved from where it is held.

Each replica holds a stretch of each bucket of weights. Megatron's own way gathers all of them on
every replica, and lets the first one write. Here each weight's state is written by the replica
that holds most of it: only what lies across a border between two stretches travels, and all
replicas write.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_jam.parallel.world import Axis

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer has of a weight: its fp32 copy (or itself) and two moments."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A weight's elements, in a row, by the replica that updates them."""

    weight: nn.Parameter
    spans: tuple[range, ...]
    """By replica; empty where one has none."""

    rank: int
    """This replica."""

    tensors: Mapping[str, Tensor]
    """This replica's state by kind, flat; nothing if it has none."""

    @cached_property
    def owner(self) -> int:
        """The replica that holds most, the first of several."""
        return max(range(len(self.spans)), key=lambda rank: len(self.spans[rank]))

    @property
    def is_owner(self) -> bool:
        """Whether this replica writes the whole."""
        return self.rank == self.owner

    @property
    def is_whole(self) -> bool:
        """Whether this replica holds all of it."""
        return len(self.spans[self.rank]) == self.weight.numel()

    @property
    def span(self) -> slice:
        """This replica's elements."""
        return slice(self.spans[self.rank].start, self.spans[self.rank].stop)


def members(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that a chain of Megatron's is made of."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def find_shares(optimizer: MegatronOptimizer, replicas: Axis) -> dict[int, Share]:
    """Of each weight that learns on this rank, by its id."""
    return {
        id(share.weight): share
        for member in members(optimizer)
        if not member.is_stub_optimizer
        for share in _shares(member, replicas)
    }


def _shares(member: MegatronOptimizer, replicas: Axis) -> Iterator[Share]:
    for buffer in member.buffers:
        for weight, (start, stop, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            size = bucket.grad_data.numel() // replicas.size
            spans = []
            for rank in range(replicas.size):
                first = bucket.offset + rank * size
                low, high = max(start, first), min(stop, first + size)
                spans.append(range(low - start, high - start) if low < high else range(0))
            has_some = len(spans[replicas.rank]) > 0
            state = member._get_main_param_and_optimizer_states(weight) if has_some else {}
            tensors = {kind: state[kind].detach() for kind in KINDS if state}
            yield Share(weight=weight, spans=tuple(spans), rank=replicas.rank, tensors=tensors)


def whole_states(shares: Sequence[Share], replicas: Axis) -> list[dict[str, Tensor]]:
    """The state of each weight that this replica owns, in the weight's shape, and nothing of the
    others. What one replica holds alone is not copied. All replicas take part.
    """
    operations: list[dist.P2POp] = []
    found: list[dict[str, Tensor]] = []
    for share in shares:
        whole: dict[str, Tensor] = {}
        for kind, mine in share.tensors.items():
            if share.is_whole:
                whole[kind] = mine
                continue
            to_or_from = [share.owner]
            part = {share.owner: mine}
            if share.is_owner:
                whole[kind] = mine.new_empty(share.weight.numel())
                whole[kind][share.span] = mine
                part = {rank: whole[kind][s.start : s.stop] for rank, s in enumerate(share.spans)}
                to_or_from = [r for r, s in enumerate(share.spans) if s and r != share.rank]
            act = dist.irecv if share.is_owner else dist.isend
            for rank in to_or_from:
                peer = dist.get_global_rank(replicas.group, rank)
                # A tag for each, as gloo may else mix up what goes between the same two ranks.
                tag = len(KINDS) * len(found) + KINDS.index(kind)
                operations.append(dist.P2POp(act, part[rank], peer, replicas.group, tag))
        found.append({kind: value.view(share.weight.shape) for kind, value in whole.items()})
    for each in dist.batch_isend_irecv(operations) if operations else ():
        each.wait()
    return found


def empty_states(shares: Sequence[Share]) -> list[dict[str, Tensor]]:
    """Where to load the state of each weight of which this replica updates a part: into the
    optimizer's own tensors, unless other replicas have a part, too."""
    found = []
    for each in shares:
        size, shape = each.weight.numel(), each.weight.shape
        tensors = each.tensors.items()
        if not each.is_whole:
            tensors = ((kind, torch.empty(size, dtype=mine.dtype)) for kind, mine in tensors)
        found.append({kind: tensor.view(shape) for kind, tensor in tensors})
    return found


@torch.no_grad()
def take_states(share: Share, loaded: Mapping[str, Tensor]) -> None:
    """Put what was loaded for `empty_states` into the optimizer."""
    for kind, value in loaded.items():
        part = value.reshape(-1)[share.span]
        if part.data_ptr() != share.tensors[kind].data_ptr():
            share.tensors[kind].copy_(part)
