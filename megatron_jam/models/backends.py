"""What layers are built from: torch's parts or Transformer Engine's.

The only file that imports Megatron's wrappers of Transformer Engine.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_jam.config.errors import UsageError
from megatron_jam.models.attention import CausalAttention
from megatron_jam.parallel.fused import find_transformer_engine
from megatron_jam.parallel.world import World


def _recompute(layer: Callable[..., tuple[Tensor, ...]], *states: Tensor) -> tuple[Tensor, ...]:
    return tensor_parallel.checkpoint(layer, False, *states)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The modules of a backend, with the arguments of Megatron's own."""

    column: Any = ColumnParallelLinear
    """Linear layer whose rows are split over tensor-parallel ranks."""

    row: Any = RowParallelLinear
    """Linear layer whose columns are split."""

    norm_column: Any = None
    """`column` behind a norm with parameters, in one; None where there is no such thing."""

    attention: Any = CausalAttention
    """Megatron's core-attention slot."""

    recompute: Callable[..., tuple[Tensor, ...]] = _recompute
    """(layer, *states) -> layer(*states), computed again in the backward pass."""

    fp8: Callable[[TransformerConfig], AbstractContextManager] = lambda _: nullcontext()
    """What the layers run in, given the whole model's settings."""


def parts_of(backend: str, fp8: str, world: World) -> Parts:
    """The parts of `backend`, "torch" or "transformer_engine".

    Raises:
        UsageError: if this machine lacks what they need; the message says what.
    """
    if backend == "torch":
        return Parts()
    engine = wrappers(world.device)
    parts = {
        "column": engine.TEColumnParallelLinear,
        "row": engine.TERowParallelLinear,
        "norm_column": engine.TELayerNormColumnParallelLinear,
        "attention": partial(FusedAttention, engine.TEDotProductAttention),
    }
    if fp8 == "none":
        return Parts(**parts)

    def recompute(layer: Callable[..., tuple[Tensor, ...]], *states: Tensor) -> tuple[Tensor, ...]:
        # Megatron's own would count the largest values twice.
        tracker = tensor_parallel.get_cuda_rng_tracker
        return engine.te_checkpoint(layer, False, tracker, world.groups.tp, *states)

    return Parts(**parts, recompute=recompute, fp8=get_fp8_context)


def wrappers(device: torch.device) -> Any:
    """Megatron's module of wrappers around Transformer Engine.

    Raises:
        UsageError: if the device is no GPU, or Transformer Engine is missing.
    """
    if device.type != "cuda":
        raise UsageError("backend transformer_engine needs an NVIDIA GPU; take backend torch here")
    found = find_transformer_engine()
    if found.missing:
        raise UsageError(
            f"backend transformer_engine: {found.missing}; install it with"
            " `pip install --no-build-isolation -e '.[gpu]'`"
        )
    from megatron.core.extensions import transformer_engine

    return transformer_engine


def fp8_settings(fp8: str) -> dict[str, Any]:
    """A recipe in the terms of Megatron's TransformerConfig.

    The joint settings need them as well: by those Megatron tells Transformer Engine that a step
    begins; without it the layers would go on with the first step's weights in FP8.
    """
    if fp8 == "none":
        return {}
    return {
        # Where each tensor has one scale, gradients need the wider range of e5m2.
        "fp8": "hybrid" if fp8 in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": fp8,
        # Transformer Engine's defaults, in place of Megatron's history of one step.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


class FusedAttention(nn.Module):
    """Megatron's core-attention slot: a fused kernel for causal attention, and ours where documents
    are isolated, as with a mask of its own Transformer Engine falls back to its slowest kernel.
    """

    def __init__(self, kernel: Any, config: TransformerConfig, **settings: Any) -> None:
        """Build both; `settings` are those of Megatron's attention."""
        super().__init__()
        self.fused = kernel(config=config, **settings)
        self.masked = CausalAttention(config=config, **settings)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
    ) -> Tensor:
        """[S, B, N, H] three times and `Places.visible` -> [S, B, N*H]."""
        if mask is not None:
            return self.masked(query, key, value, mask)
        return self.fused(query, key, value, None, **settings)
