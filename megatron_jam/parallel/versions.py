"""What differs between the versions of Megatron-Core that this package runs with."""

import inspect
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import MegatronOptimizer

WRITER_RESULTS = next(
    name
    for name in ("_get_write_results_queue", "get_write_results_queue")  # 0.16.1's, 0.19.2's
    if hasattr(filesystem_async, name)
)
"""Megatron's name, in `filesystem_async`, of what makes the queue of a checkpoint's writers."""

OWN_WRITERS: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
"""How `dist_checkpointing.save` is told to prepare Megatron's own asynchronous writers: later
versions ask for NVIDIA's resiliency extension unless they are told."""


def match_groups(saved: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Give the groups of a saved optimizer's description this run's highest learning rate.

    Later versions find a group by it, too, where a run that goes on with another rate, or whose
    checkpoint is of another engine, has none such.
    """
    for group in saved.get("optimizer", saved).get("param_groups", []):
        group["max_lr"] = optimizer.config.lr
