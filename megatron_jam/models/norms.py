"""Norms with or without learnable parameters, fit for tensor and sequence parallelism.

Megatron's own norms always have parameters, and its local ones refuse sequence parallelism.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F


class _Norm:
    """Takes what Megatron's layers give a norm; sequence parallelism sums its gradients."""

    groups: int

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        affine: bool = False,
        groups: int = 1,
    ) -> None:
        settings = {"elementwise_affine": affine, "dtype": config.params_dtype}
        super().__init__(hidden_size, eps, **settings)  # type: ignore[call-arg]
        self.groups = groups
        for parameter in self.parameters():  # type: ignore[attr-defined]
            parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(_Norm, nn.LayerNorm):
    """Layer norm over the width, or over each of its `groups`; scale and shift of each element."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., d] -> the same."""
        if self.groups == 1:
            return super().forward(states)
        parts = states.unflatten(-1, (self.groups, -1))
        normed = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return normed if self.weight is None else torch.addcmul(self.bias, normed, self.weight)


class RMSNorm(_Norm, nn.RMSNorm):
    """Root-mean-square norm over the width, or over each of its `groups`."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., d] -> the same."""
        if self.groups == 1:
            return super().forward(states)
        parts = states.unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return normed if self.weight is None else normed * self.weight


NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}


class HeadNorm(nn.Module):
    """Layer norm over each head, with scale and shift of each head's own (Chameleon).

    They are split over tensor-parallel ranks as the heads are, and vectors [heads x H], which
    Megatron's optimizer does not decay.
    """

    def __init__(self, num_heads: int, head_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_size, dtype=dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """[S, B, N, H] -> the same, with Chameleon's epsilon."""
        weight, bias = (x.view(heads.shape[-2:]) for x in (self.weight, self.bias))
        return F.layer_norm(heads, heads.shape[-1:], eps=1e-5) * weight + bias
