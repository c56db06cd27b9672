"""Layer specs: how a tower's layer and a bridge are put together from Megatron-Core's parts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.config.model import IMAGE, TEXT, ModelConfig, TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.attention import NormedSelfAttention, Places
from megatron_jam.models.backends import Parts, fp8_settings
from megatron_jam.models.norms import NORMS


def engine_config(
    tower: TowerConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    recompute: str,
    dropout: float = 0.0,
    backend: str = "torch",
    fp8: str = "none",
    fuses_gradients: bool = False,
) -> TransformerConfig:
    """A tower's settings in Megatron-Core's terms."""
    return TransformerConfig(
        num_layers=tower.num_layers,
        hidden_size=tower.hidden_size,
        num_attention_heads=tower.num_heads,
        num_query_groups=tower.kv_heads,
        ffn_hidden_size=tower.inner_size,
        activation_func=ACTIVATIONS[tower.activation],
        gated_linear_unit=tower.gated,
        add_bias_linear=tower.bias,
        layernorm_epsilon=tower.norm_epsilon,
        normalization={"layer": "LayerNorm", "rms": "RMSNorm"}[tower.norm],
        hidden_dropout=dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        # Stages are ours: Megatron would add a stage's offset to the layer numbers by itself.
        pipeline_model_parallel_size=1,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        recompute_granularity="selective" if recompute == "selective" else None,
        recompute_modules=["core_attn"] if recompute == "selective" else None,
        # Weights come from a weights folder. Megatron's layers are made on torch's default device,
        # which JamModel sets; Transformer Engine's would be made on the CPU itself.
        perform_initialization=False,
        use_cpu_initialization=backend == "torch",
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=fuses_gradients,
        **fp8_settings(fp8),
    )


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": _gelu_tanh,
    "silu": F.silu,
}


def build_norm(
    tower: TowerConfig, config: TransformerConfig, width: int | None = None
) -> nn.Module:
    """A norm of a tower's kind over its width, or another one, outside Megatron's layers."""
    width = width or tower.hidden_size
    return NORMS[tower.norm](
        config, width, tower.norm_epsilon, affine=tower.affine_norm, groups=tower.norm_groups
    )


def _norm(tower: TowerConfig) -> ModuleSpec:
    params = {"affine": tower.affine_norm, "groups": tower.norm_groups}
    return ModuleSpec(module=NORMS[tower.norm], params=params)


def _norm_and_linear(tower: TowerConfig, parts: Parts) -> tuple[Any, Any]:
    """A norm and the column-parallel linear layer behind it; in one where `parts` have that. That
    one always has parameters and one group, so that other norms stay apart."""
    if tower.affine_norm and tower.norm_groups == 1 and parts.norm_column is not None:
        return IdentityOp, parts.norm_column
    return _norm(tower), parts.column


def _mlp(column: Any, parts: Parts) -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=parts.row))


def tower_layer_spec(tower: TowerConfig, parts: Parts = Parts()) -> ModuleSpec:
    """norm -> causal self-attention -> add; norm -> FFN -> add."""
    norm, column = _norm_and_linear(tower, parts)
    attention = ModuleSpec(
        module=NormedSelfAttention if tower.qk_norm else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=parts.attention,
            linear_proj=parts.row,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp(column, parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def bridge_spec(tower: TowerConfig, width: int, parts: Parts = Parts()) -> ModuleSpec:
    """norm on the reader's states -> causal cross-attention to the raw states of the other tower,
    of another `width` maybe -> add; norm -> FFN -> add (the authors' code; the paper's eq. 4-5 show
    the attention alone)."""

    def linear_kv(_: int, *sizes: int, **settings: Any) -> nn.Module:
        # Megatron's cross-attention knows one width, that of the reader.
        return parts.column(width, *sizes, **settings)

    norm, column = _norm_and_linear(tower, parts)
    attention = ModuleSpec(
        module=CrossAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=CrossAttentionSubmodules(
            linear_q=column,
            linear_kv=linear_kv,
            core_attention=parts.attention,
            linear_proj=parts.row,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_cross_attn_layernorm=norm,
            cross_attention=attention,
            cross_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp(column, parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class JointLayer(nn.Module):
    """Layer l of every tower and, where the model has one, the bridge that follows it."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        engine: Callable[[TowerConfig], TransformerConfig],
        groups: ProcessGroupCollection,
        parts: Parts = Parts(),
    ) -> None:
        super().__init__()
        self.names = model.tower_names

        def build(spec: ModuleSpec, tower: TowerConfig) -> Any:
            settings = {"layer_number": layer + 1, "pg_collection": groups}
            return build_module(spec, config=engine(tower), **settings)

        self.towers, self.bridges = nn.ModuleDict(), nn.ModuleDict()
        self.context_norms = nn.ModuleDict()
        for name in model.tower_names:
            if model.tower_layer(name, layer) is not None:
                tower = model.towers[name]
                self.towers[name] = build(tower_layer_spec(tower, parts), tower)
        for name in model.bridges_into(layer):
            # A bridge has as many heads for keys and values as for queries.
            tower = replace(model.towers[name], num_kv_heads=0)
            other = model.towers[model.other_tower(name)]
            self.bridges[name] = build(bridge_spec(tower, other.hidden_size, parts), tower)
            if model.bridges.kv_norm:
                norm = build_norm(tower, engine(tower), other.hidden_size)
                self.context_norms[name] = norm

    def forward(self, places: Places, *states: Tensor) -> tuple[Tensor, ...]:
        """Map each tower's states [S, B, d] to its next ones."""
        mask, reached = places.visible, list(states)
        for i, name in enumerate(self.names):
            if name in self.towers:
                angles = places.angles[i]
                tower = self.towers[name]
                reached[i] = tower(states[i], attention_mask=mask, rotary_pos_emb=angles)[0]
        if not self.bridges:
            return tuple(reached)
        # Both directions read the states from before either update.
        image, text = reached
        return self._bridge(IMAGE, image, text, mask), self._bridge(TEXT, text, image, mask)

    def _bridge(self, name: str, state: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        """The next state of tower `name`, which reads the other one's if a bridge leads there."""
        if name not in self.bridges:
            return state
        if name in self.context_norms:
            other = self.context_norms[name](other)
        bridge = self.bridges[name]
        return bridge(state, attention_mask=None, context=other, context_mask=mask)[0]
