"""The ranks of a run: process groups are built here once and handed down.

Only this file reads Megatron's global `parallel_state`.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.cpu import prepare_megatron, provide_adam, provide_writer_results
from megatron_jam.parallel.device import communication_backend, select_device


@dataclass(frozen=True, kw_only=True)
class Axis:
    """This rank's place along one axis of parallelism."""

    group: dist.ProcessGroup
    """The ranks that differ along this axis alone."""

    rank: int
    """Place of this process in the group."""

    size: int
    """Number of ranks in the group."""

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the group."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last rank of the group."""
        return self.rank == self.size - 1


@dataclass(frozen=True, kw_only=True)
class World:
    """Device, process groups and ranks of this process."""

    device: torch.device
    parallel: ParallelConfig
    groups: ProcessGroupCollection
    """Megatron-Core's collection, for its modules."""

    tensor: Axis
    pipeline: Axis
    data: Axis
    """Replicas that learn from samples of their own."""

    context: Axis
    """Ranks that share each sequence."""

    replicas: Axis
    """Ranks with the same weights: those of `data` and `context` together."""

    @property
    def rank(self) -> int:
        """Rank among all ranks."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Number of all ranks."""
        return dist.get_world_size()

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last stage's `tensor`, on every pipeline stage; in place where that is possible."""
        if self.pipeline.size > 1:
            tensor = tensor.contiguous()
            source = dist.get_global_rank(self.pipeline.group, self.pipeline.size - 1)
            dist.broadcast(tensor, source, group=self.pipeline.group)
        return tensor


def start_world(parallel: ParallelConfig, *, timeout_minutes: float = 30.0) -> World:
    """Join torchrun's ranks (or start a world of one) and build the process groups.

    Raises:
        UsageError: if tensor x pipeline x context does not divide the number of ranks.
    """
    device = select_device()
    if not dist.is_initialized():
        _join(device, timedelta(minutes=timeout_minutes))
    return build_world(parallel, device)


def build_world(parallel: ParallelConfig, device: torch.device) -> World:
    """Build the process groups over a default group that is already there."""
    if device.type == "cpu":
        prepare_megatron()
    provide_adam(device)
    provide_writer_results()
    parallel.data(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.interleave if parallel.interleave > 1 else None
        ),
        context_parallel_size=parallel.context,
        # A second set of groups for exchanges over the CPU, which nothing here makes.
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return World(
        device=device,
        parallel=parallel,
        groups=groups,
        tensor=_axis(groups.tp),
        pipeline=_axis(groups.pp),
        data=_axis(groups.dp),
        context=_axis(groups.cp),
        replicas=_axis(groups.dp_cp),
    )


def stop_world() -> None:
    """Leave all process groups, so that another world can be started."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(device: torch.device, timeout: timedelta) -> None:
    backend = communication_backend(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group=group, rank=dist.get_rank(group), size=dist.get_world_size(group))
