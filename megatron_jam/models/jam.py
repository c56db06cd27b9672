"""JamModel: one or two towers, bridges and head; this rank's share of it.

Shape letters: S sequence, B batch, d width, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import FP8_MULTIPLES
from megatron_jam.models.attention import Places, rotary_angles, visible_tokens
from megatron_jam.models.backends import fp8_settings, parts_of
from megatron_jam.models.embedding import Embedding
from megatron_jam.models.head import Head
from megatron_jam.models.layers import JointLayer, engine_config
from megatron_jam.models.stages import stage_layers
from megatron_jam.parallel.fused import fuses_weight_gradients
from megatron_jam.parallel.world import World


class JamModel(MegatronModule):
    """One chunk of a model's layers, with the embedding on the first and the head on the last one.

    Both towers' layer l and their bridge live together; where the model is cut into pipeline stages
    the towers' states cross as one tensor [S, B, sum of widths], in the order image, text.
    """

    # Megatron reduces one tied table by itself; `tied_weights` and training/ reduce all of them.
    share_embeddings_and_output_weights = False

    def __init__(
        self,
        model: ModelConfig,
        world: World,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        dropout: float = 0.0,
        backend: str = "torch",
        fp8: str = "none",
        z_loss: float = 0.0,
        main_gradients: bool = True,
        chunk: int = 0,
    ) -> None:
        """Build chunk `chunk` of this stage; weights are left for `weights/load.py` to fill.

        `z_loss` is of `linear_cross_entropy`; `main_gradients` is whether Megatron's wrapper will
        keep gradients, to which tables, and linear layers with fused kernels, add theirs.

        Raises:
            UsageError: if the layout does not fit the model, or the backend is not there; the
                message names the setting.
        """
        parallel = world.parallel
        parallel.check_backend(backend)
        check_layout(model, parallel, fp8)
        super().__init__(config=joint_engine_config(model, world, dtype, fp8, main_gradients))
        self.parts = parts_of(backend, fp8, world)
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = model
        self.recompute, self.dropout = recompute == "full", dropout
        self.z_loss = z_loss
        self.groups = world.groups
        self.layer_range = stage_layers(model, parallel, stage=world.pipeline.rank, chunk=chunk)
        self.pre_process = world.pipeline.is_first and chunk == 0
        self.post_process = world.pipeline.is_last and chunk == parallel.interleave - 1
        self.vp_stage = chunk if parallel.interleave > 1 else None
        self._received: Tensor | None = None
        settings = {"dtype": dtype, "recompute": recompute, "dropout": dropout}
        settings |= {"backend": backend, "fp8": fp8}
        # Megatron knows no kernel that adds to fp64 sums.
        fuses = main_gradients and dtype is not torch.float64
        settings["fuses_gradients"] = fuses and fuses_weight_gradients(world.device)
        with torch.device(world.device):
            self._build(world, partial(engine_config, **settings))

    def _build(self, world: World, engine: Callable[..., TransformerConfig]) -> None:
        model, joint = self.model_config, self.config
        engine = partial(engine, parallel=world.parallel)
        if self.pre_process:
            self.embedding = Embedding(model, joint, world)
        self.layers = nn.ModuleDict(
            {
                str(i): JointLayer(model, i, engine, world.groups, self.parts)
                for i in self.layer_range
            }
        )
        if self.post_process:
            self.head = Head(model, joint, world, reads_tables=model.tied and self.pre_process)

    def set_input_tensor(self, tensor: Any) -> None:
        """Receive the previous stage's states from Megatron's schedule."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        with_head: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this chunk.

        Args:
            tokens: int64 [B, S].
            positions: int64 [B, S], counted from 0.
            labels: int64 [B, S]; without them the last stage returns logits.
            mask: float32 [B, S]; what each position's loss counts, with labels.
            documents: int64 [B, S]; with them a token attends to tokens of its own number alone, in
                towers and bridges. `positions` are then counted within documents.
            with_head: whether the last stage has its head, or returns states as all others do; so
                a prompt fills a KeyValueCache.

        Returns:
            The states [S, B, sum of d] for the next stage. On the last stage the sum of the masked
            losses, a scalar, and every position's loss [B, S] without a gradient, in nats, fp32
            (float64 for float64 models); or with no labels this rank's share of the logits,
            [S, B, padded V / TP].
        """
        states = self.run_layers(tokens, positions, documents)
        if not (self.post_process and with_head):
            joined = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
            # The schedule goes backward through every stage, also through a frozen one.
            wanted = self.training and torch.is_grad_enabled() and not joined.requires_grad
            return joined.requires_grad_() if wanted else joined
        reads_tables = self.model_config.tied and self.pre_process
        tables = self.embedding.rows if reads_tables else None
        if labels is None:
            return self.head.logits(states, tables)
        assert mask is not None, "labels need a mask"
        return self.head.loss(states, tables, labels, mask, z_loss=self.z_loss)

    def run_layers(
        self, tokens: Tensor, positions: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Each tower's states [S, B, d] behind this chunk's last layer.

        Without the head this is how a prompt fills a KeyValueCache.
        """
        states = self._enter(tokens, positions)
        places = self._places(positions, documents)
        with self._random_numbers(), self.parts.fp8(self.config):
            for layer in self.layers.values():
                if self.recompute and self.training:
                    # Of inputs that need no gradient its outputs would need none, nor its weights.
                    states = tuple(
                        each if each.requires_grad else each.detach().requires_grad_()
                        for each in states
                    )
                    states = self.parts.recompute(partial(layer, places), *states)
                else:
                    states = layer(places, *states)
        return states

    def _random_numbers(self) -> AbstractContextManager:
        """What dropout draws from: the same on tensor-parallel ranks, unless each holds tokens of
        its own."""
        if self.training and self.dropout and self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return nullcontext()

    def _places(self, positions: Tensor, documents: Tensor | None) -> Places:
        towers = (self.model_config.towers[name] for name in self.model_config.tower_names)
        angles = [
            rotary_angles(positions, tower.head_size, tower.rope_base, self.config.params_dtype)
            if tower.positions == "rope"
            else None
            for tower in towers
        ]
        return Places(angles, None if documents is None else visible_tokens(documents))

    def _enter(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        if self.pre_process:
            return self.embedding(tokens, positions)
        assert self._received is not None, "the previous stage has sent nothing"
        model = self.model_config
        widths = [model.towers[name].hidden_size for name in model.tower_names]
        return tuple(x.contiguous() for x in self._received.split(widths, dim=-1))

    def tied_weights(self) -> list[nn.Parameter]:
        """Tables that the first and the last stage each hold a copy of, in a fixed order."""
        if not self.model_config.tied:
            return []
        if self.pre_process and not self.post_process:
            return self.embedding.rows
        if self.post_process and not self.pre_process:
            return list(self.head.tables.values())
        return []


def joint_engine_config(
    model: ModelConfig,
    world: World,
    dtype: torch.dtype,
    fp8: str = "none",
    main_gradients: bool = False,
) -> TransformerConfig:
    """Megatron's settings for the model as a whole: schedules, gradients, embedding and head.

    Its `hidden_size` is the width of what crosses a stage boundary.
    """
    parallel = world.parallel
    interleaved = parallel.interleave > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.joint_size,
        num_attention_heads=sum(tower.num_heads for tower in model.towers.values()),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if interleaved else None,
        # At PP=2 batched sends of the interleaved schedule are mixed up, silently.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        perform_initialization=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=main_gradients,
        **fp8_settings(fp8),
    )


def check_layout(model: ModelConfig, parallel: ParallelConfig, fp8: str = "none") -> None:
    """Refuse a layout or FP8 recipe that the model cannot take, naming the setting."""
    tensor = parallel.tensor
    for name, tower in model.towers.items():
        divided = {
            "num_heads": tower.num_heads,
            "num_kv_heads": tower.kv_heads,
            "ffn_size": tower.inner_size,
        }
        for setting, value in divided.items():
            if value % tensor:
                raise UsageError(
                    f"parallel.tensor {tensor} does not divide {setting} {value} of tower {name};"
                    " choose a divisor of it"
                )
        widths = {
            "hidden_size": tower.hidden_size,
            "num_heads x head size": tower.num_heads * tower.head_size // tensor,
            "num_kv_heads x head size": tower.kv_heads * tower.head_size // tensor,
            "ffn_size": tower.inner_size // tensor,
        }
        for setting, value in widths.items():
            if fp8 != "none" and value % FP8_MULTIPLES[fp8]:
                raise UsageError(
                    f"fp8 {fp8} needs a rank's {setting} of tower {name} to be a multiple of"
                    f" {FP8_MULTIPLES[fp8]}, not {value}"
                )
