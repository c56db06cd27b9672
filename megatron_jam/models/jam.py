"""JamModel: one or two towers, bridges and head; this rank's share of it.

Shape letters: S sequence, B batch, d width, V vocabulary.
"""

import math
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.attention import Places, rotary_angles, visible_tokens
from megatron_jam.models.layers import JointLayer, build_norm, engine_config
from megatron_jam.models.loss import vocab_parallel_cross_entropy
from megatron_jam.models.stages import stage_layers
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
        chunk: int = 0,
    ) -> None:
        """Build chunk `chunk` of this stage; weights are left for `weights/load.py` to fill.

        Raises:
            UsageError: if the layout does not fit the model; the message names the setting.
        """
        parallel = world.parallel
        check_layout(model, parallel)
        super().__init__(config=joint_engine_config(model, world, dtype))
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = model
        self.recompute = recompute == "full"
        self.groups = world.groups
        stages = parallel.pipeline
        self.layer_range = stage_layers(
            model.num_layers,
            stages=stages,
            interleave=parallel.interleave,
            stage=world.pipeline.rank,
            chunk=chunk,
        )
        self.pre_process = world.pipeline.is_first and chunk == 0
        self.post_process = world.pipeline.is_last and chunk == parallel.interleave - 1
        self.vp_stage = chunk if parallel.interleave > 1 else None
        self._received: Tensor | None = None
        with torch.device(world.device):
            self._build(world, dtype, recompute)

    def _build(self, world: World, dtype: torch.dtype, recompute: str) -> None:
        model, joint = self.model_config, self.config
        engine = partial(engine_config, parallel=world.parallel, dtype=dtype, recompute=recompute)
        if self.pre_process:
            self.embedding: nn.Module = (
                nn.ModuleDict({n: Embedding(model, n, joint, world) for n in model.tower_names})
                if model.separate
                else Embedding(model, model.tower_names[0], joint, world)
            )
        self.layers = nn.ModuleDict(
            {str(i): JointLayer(model, i, engine, world.groups) for i in self.layer_range}
        )
        if self.post_process:
            head = SeparateHead if model.separate else Head
            self.head = head(model, joint, world, reads_tables=model.tied and self.pre_process)

    def set_input_tensor(self, tensor: Any) -> None:
        """Receive the previous stage's states from Megatron's schedule."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk.

        Args:
            tokens: int64 [B, S].
            positions: int64 [B, S], counted from 0.
            labels: int64 [B, S]; without them the last stage returns logits.
            documents: int64 [B, S]; with them a token attends to tokens of its own number alone, in
                towers and bridges. `positions` are then counted within documents.

        Returns:
            The states [S, B, sum of d] for the next stage; on the last stage the loss of each
            position, float32 [B, S] in nats (float64 for float64 models), or with no labels this
            rank's share of the logits, [S, B, padded V / TP].
        """
        states = self.run_layers(tokens, positions, documents)
        if not self.post_process:
            return torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        reads_tables = self.model_config.tied and self.pre_process
        logits = self.head(states, self._tables() if reads_tables else None)
        return logits if labels is None else self._loss(logits, labels)

    def run_layers(
        self, tokens: Tensor, positions: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Each tower's states [S, B, d] behind this chunk's last layer.

        Without the head this is how a prompt fills a KeyValueCache.
        """
        states = self._enter(tokens, positions)
        places = self._places(positions, documents)
        for layer in self.layers.values():
            if self.recompute and self.training:
                states = tensor_parallel.checkpoint(partial(layer, places), False, *states)
            else:
                states = layer(places, *states)
        return states

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
        towers = self.model_config.towers
        if self.pre_process and self.model_config.separate:
            return tuple(each(tokens, positions) for each in self.embedding.values())
        if self.pre_process:
            # One embedding feeds both towers (the authors' code).
            return (self.embedding(tokens, positions),) * len(towers)
        assert self._received is not None, "the previous stage has sent nothing"
        widths = [towers[name].hidden_size for name in self.model_config.tower_names]
        return tuple(x.contiguous() for x in self._received.split(widths, dim=-1))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1).contiguous(),
            num_real=self.head.num_real,
            group=self.groups.tp,
        )
        return loss.transpose(0, 1).contiguous()

    def tied_weights(self) -> list[nn.Parameter]:
        """Tables that the first and the last stage each hold a copy of, in a fixed order."""
        if not self.model_config.tied:
            return []
        if self.pre_process and not self.post_process:
            return self._tables()
        if self.post_process and not self.pre_process:
            return list(self.head.output.parameters())
        return []

    def _tables(self) -> list[nn.Parameter]:
        """The token tables of the first stage: one, or the image and the text tower's."""
        separate = self.model_config.separate
        embeddings = self.embedding.values() if separate else [self.embedding]
        return [each.tokens.weight for each in embeddings]


class Embedding(nn.Module):
    """Token rows, split over tensor-parallel ranks by vocabulary, plus learned positions if the
    tower has them."""

    def __init__(
        self, model: ModelConfig, tower: str, config: TransformerConfig, world: World
    ) -> None:
        super().__init__()
        d = model.hidden_size
        self.offset = model.position_offset
        self.sequence_parallel = config.sequence_parallel
        self.group = world.groups.tp
        self.tokens = VocabParallelEmbedding(
            padded_vocabulary(model.vocab_size, world.tensor.size),
            d,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=self.sequence_parallel,
            config=config,
            tp_group=self.group,
        )
        self.positions: nn.Embedding | None = None
        if model.towers[tower].positions == "learned":
            rows = model.max_positions + self.offset
            self.positions = nn.Embedding(rows, d, dtype=config.params_dtype)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """int64 [B, S] twice -> [S, B, d] (S / TP with sequence parallelism)."""
        words = self.tokens(tokens)
        if self.positions is None:
            return words if self.sequence_parallel else words.transpose(0, 1).contiguous()
        places = self.positions(positions + self.offset).transpose(0, 1)
        if not self.sequence_parallel:
            return words.transpose(0, 1) + places
        places = places.contiguous()
        return words + tensor_parallel.scatter_to_sequence_parallel_region(places, group=self.group)


class Head(nn.Module):
    """States -> logits: for two towers [image ; text] -> Linear(2d, d); then norm, tied rows."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, world: World, *, reads_tables: bool
    ) -> None:
        super().__init__()
        d = model.hidden_size
        tower = model.towers[model.tower_names[0]]
        if model.is_pair:
            self.projection = nn.Linear(2 * d, d, bias=False, dtype=config.params_dtype)
            self.projection.weight.sequence_parallel = config.sequence_parallel
        self.norm = build_norm(tower, config)
        self.output = _output(model, config, world, reads_tables)
        self.num_real = num_real_rows(model.vocab_size, world)

    def forward(self, states: tuple[Tensor, ...], tables: list[nn.Parameter] | None) -> Tensor:
        """[S, B, d] of each tower -> this rank's logits [S, B, padded V / TP]."""
        hidden = states[0]
        if len(states) > 1:
            hidden = F.linear(torch.cat(states, dim=-1), self.projection.weight)
        logits, _ = self.output(self.norm(hidden), weight=tables[0] if tables else None)
        return logits


class SeparateHead(nn.Module):
    """Each tower's states -> its own norm and tied rows; text ids are the text tower's to say."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, world: World, *, reads_tables: bool
    ) -> None:
        super().__init__()
        self.norm, self.output = nn.ModuleDict(), nn.ModuleDict()
        for name in model.tower_names:
            self.norm[name] = build_norm(model.towers[name], config)
            self.output[name] = _output(model, config, world, reads_tables)
        self.num_real = num_real_rows(model.vocab_size, world)
        local = padded_vocabulary(model.vocab_size, world.tensor.size) // world.tensor.size
        ids = torch.arange(local) + world.tensor.rank * local
        first, count = model.text_ids
        is_text = (ids >= first) & (ids < first + count)
        self.register_buffer("is_text", is_text, persistent=False)

    def forward(self, states: tuple[Tensor, ...], tables: list[nn.Parameter] | None) -> Tensor:
        """[S, B, d] of each tower -> this rank's logits [S, B, padded V / TP]."""
        image, text = (
            self.output[name](self.norm[name](state), weight=table)[0]
            for name, state, table in zip(
                self.output, states, tables or [None] * len(states), strict=True
            )
        )
        return torch.where(self.is_text, text, image)


def _output(
    model: ModelConfig, config: TransformerConfig, world: World, reads_tables: bool
) -> ColumnParallelLinear:
    """The output rows; if it `reads_tables` they are the embedding's, given to each call."""
    return ColumnParallelLinear(
        model.hidden_size,
        padded_vocabulary(model.vocab_size, world.tensor.size),
        config=config,
        init_method=nn.init.zeros_,
        bias=False,
        skip_weight_param_allocation=reads_tables,
        tp_group=world.groups.tp,
    )


def num_real_rows(vocab_size: int, world: World) -> int:
    """This rank's output rows that are no padding; padding is never in a loss."""
    local = padded_vocabulary(vocab_size, world.tensor.size) // world.tensor.size
    return max(0, min(local, vocab_size - world.tensor.rank * local))


def padded_vocabulary(size: int, tensor: int) -> int:
    """Rows of the token table in memory: the smallest multiple of TP that holds `size`."""
    return math.ceil(size / tensor) * tensor


def joint_engine_config(model: ModelConfig, world: World, dtype: torch.dtype) -> TransformerConfig:
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
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        perform_initialization=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that the model cannot take, naming the setting."""
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
