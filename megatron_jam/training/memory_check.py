"""A run's memory: what is planned, what the device has, and what was measured."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_jam.config.log import logger
from megatron_jam.parallel.device import (
    device_memory_bytes,
    held_memory_bytes,
    peak_memory_bytes,
)
from megatron_jam.parallel.world import World
from megatron_jam.planning.memory import plan
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.step import StepResult

if TYPE_CHECKING:
    from megatron_jam.training.loop import Training

_STEPS = 2
"""By then the optimizer and the allocator have all that they take."""


class MemoryCheck(Callback):
    """Says what each stage's ranks are to hold, and after the second step what they did."""

    def __init__(self, world: World) -> None:
        """Make it before the model: what the process holds now is not the run's."""
        self._world, self._made = world, 0
        self._before = held_memory_bytes(world.device)
        self._planned = 0

    def begins(self, training: "Training", first: int) -> None:
        """Say what is planned, and warn where the device has less."""
        config, world = training.config, self._world
        stages = plan(
            training.folder.config,
            config.parallel,
            replicas=world.data.size,
            micro_batch_size=config.micro_batch_size,
            num_micro_batches=config.num_micro_batches(world.size),
            context_length=config.context_length,
            precision=config.precision,
            frozen=config.freeze,
            zero=config.deepspeed if config.engine == "deepspeed" else None,
        )
        mine = stages[world.pipeline.rank]
        self._planned = mine.state.total + mine.activations[config.recompute]
        has = device_memory_bytes(self._world.device)
        planned, state, least = self._largest(self._planned, mine.state.total, -has)
        logger.info(
            "memory planned: %.2f GB a rank (weights, gradients, optimizer %.2f GB) of %.2f GB",
            planned / 1e9,
            state / 1e9,
            -least / 1e9,
        )
        if planned > -least:
            logger.info(
                "the plan is more than the device has: see tools/show_layout.py for other layouts,"
                " micro-batches and recomputation"
            )

    def step_made(self, step: int, result: StepResult) -> None:
        """After the second step of this start, say what was measured."""
        self._made += 1
        if self._made != _STEPS:
            return
        measured = peak_memory_bytes(self._world.device) - self._before
        (most,) = self._largest(measured)
        planned, before = self._largest(self._planned, self._before)
        logger.info(
            "memory measured at step %d: %.2f GB a rank at the peak, planned %.2f GB"
            " (besides %.2f GB that the process held before)",
            step,
            most / 1e9,
            planned / 1e9,
            before / 1e9,
        )

    def _largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        found = torch.tensor(values, dtype=torch.int64, device=self._world.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()
