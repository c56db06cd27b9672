"""Stand-ins for Megatron's wrappers of Transformer Engine, which run on a CPU.

They take the same arguments (tests/models/test_backends.py compares them with Megatron's source),
name their parameters alike, and compute with Megatron's own layers.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.models import backends
from megatron_jam.parallel.context import context_share
from megatron_jam.parallel.world import World


class TEColumnParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
        stride: int = 1,
        name: str | None = None,
    ) -> None:
        assert not any((gather_output, is_expert, skip_weight_param_allocation))
        assert not config.use_cpu_initialization, "its weights would be made on the CPU"
        settings = {"config": config, "init_method": init_method, "tp_group": tp_group}
        settings |= {"bias": bias, "skip_bias_add": skip_bias_add, "stride": stride}
        super().__init__(input_size, output_size, **settings)


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
        stride: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            gather_output=gather_output,
            bias=bias,
            skip_bias_add=skip_bias_add,
            is_expert=is_expert,
            tp_group=tp_group,
            stride=stride,
        )
        dtype = config.params_dtype
        self.normalization, self.eps = config.normalization, config.layernorm_epsilon
        # Always with parameters, whatever the tower has.
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.layer_norm_bias = None
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(input_size, dtype=dtype))
            self.layer_norm_bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Any:
        width = (x.shape[-1],)
        if self.normalization == "LayerNorm":
            x = F.layer_norm(x, width, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            x = F.rms_norm(x, width, self.layer_norm_weight, self.eps)
        return super().forward(x)


class TERowParallelLinear(RowParallelLinear):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
        name: str | None = None,
    ) -> None:
        assert input_is_parallel
        assert not is_expert
        settings = {"config": config, "init_method": init_method, "tp_group": tp_group}
        settings |= {"bias": bias, "skip_bias_add": skip_bias_add}
        super().__init__(input_size, output_size, input_is_parallel=True, **settings)


class TEDotProductAttention(nn.Module):
    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type is AttnMaskType.causal
        assert attention_type in ("self", "cross")
        assert pg_collection is not None
        self.group = pg_collection.cp
        assert config.context_parallel_size == self.group.size()
        tensor = pg_collection.tp.size()
        assert config.tensor_model_parallel_size == tensor
        self.heads = config.num_attention_heads // tensor, config.num_query_groups // tensor

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        assert attn_mask_type is AttnMaskType.causal
        assert attention_mask is None
        assert attention_bias is None
        assert packed_seq_params is None
        assert (query.shape[2], key.shape[2]) == self.heads
        assert query.shape[0] == key.shape[0], "causal across other lengths is another mask"
        size, rank, length = self.group.size(), self.group.rank(), query.shape[0]
        places = torch.arange(length * size)[None]
        if size > 1:
            shares = torch.cat([context_share(places, r, size)[0] for r in range(size)])
            gather = tensor_parallel.gather_from_sequence_parallel_region
            key, value = (gather(x, group=self.group)[shares.argsort()] for x in (key, value))
        mine = context_share(places, rank, size)[0]
        visible = mine[:, None] >= places
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return out.permute(2, 0, 1, 3).flatten(2)


def te_checkpoint(
    forward_func: Callable,
    distribute_saved_activations: bool,
    get_rng_state_tracker: Callable,
    tp_group: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    assert not distribute_saved_activations
    assert not kwargs
    assert get_rng_state_tracker() is tensor_parallel.get_cuda_rng_tracker()
    return tensor_parallel.checkpoint(forward_func, False, *args)


STAND_INS = SimpleNamespace(
    TEColumnParallelLinear=TEColumnParallelLinear,
    TELayerNormColumnParallelLinear=TELayerNormColumnParallelLinear,
    TERowParallelLinear=TERowParallelLinear,
    TEDotProductAttention=TEDotProductAttention,
    te_checkpoint=te_checkpoint,
)
"""In place of megatron.core.extensions.transformer_engine."""


def with_stand_ins(world: World, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """`function(world, *args)` with layers of stand-ins, in a worker process."""
    with mock.patch.object(backends, "wrappers", return_value=STAND_INS):
        return function(world, *args, backend="transformer_engine", **settings)
