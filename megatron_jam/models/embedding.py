"""Token ids -> the states in which the towers begin."""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.config.model import MAIN, ModelConfig
from megatron_jam.models.main_gradients import LookUp
from megatron_jam.models.parameters import padded_vocabulary
from megatron_jam.parallel.world import World


class Embedding(nn.Module):
    """Every token table of a model, and what leads from a shared one to a narrower tower."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, world: World) -> None:
        super().__init__()
        self.model_config = model
        self.tables = nn.ModuleDict(
            {name: Table(model, name, config, world) for name in model.table_names}
        )
        self.projections = nn.ModuleDict()
        for name in model.projected_towers:
            sizes = model.hidden_size, model.towers[name].hidden_size
            self.projections[name] = nn.Linear(*sizes, bias=False, dtype=config.params_dtype)
            # Each sequence-parallel rank sees a part of the tokens; Megatron adds the gradients up.
            self.projections[name].weight.sequence_parallel = config.sequence_parallel

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """int64 [B, S] twice -> each tower's [S, B, d] (S / TP with sequence parallelism)."""
        rows = {name: table(tokens, positions) for name, table in self.tables.items()}
        states = {name: rows.get(name, rows.get(MAIN)) for name in self.model_config.tower_names}
        for name, projection in self.projections.items():
            states[name] = F.linear(states[name], projection.weight)
        return tuple(states.values())

    @property
    def rows(self) -> list[nn.Parameter]:
        """The token tables' weights."""
        return [table.tokens.weight for table in self.tables.values()]


class TokenRows(VocabParallelEmbedding):
    """Megatron's, which adds its gradients to the sums of Megatron's wrapper if there will be
    any."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.main_gradients = config.gradient_accumulation_fusion

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, d], or [S / TP, B, d] with sequence parallelism."""
        if not (self.main_gradients and self.weight.requires_grad):
            return super().forward(tokens)
        local = tokens - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        rows = LookUp.apply(local.masked_fill(elsewhere, 0), self.weight)
        if self.tp_group.size() > 1:
            rows = rows.masked_fill(elsewhere[..., None], 0)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class Table(nn.Module):
    """Token rows, split over tensor-parallel ranks by vocabulary, plus learned positions if its
    tower has them."""

    def __init__(
        self, model: ModelConfig, name: str, config: TransformerConfig, world: World
    ) -> None:
        super().__init__()
        d = model.table_width(name)
        self.offset = model.position_offset
        self.sequence_parallel = config.sequence_parallel
        self.group = world.groups.tp
        self.tokens = TokenRows(
            padded_vocabulary(model.vocab_size, world.tensor.size),
            d,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=self.sequence_parallel,
            config=config,
            tp_group=self.group,
        )
        self.positions: nn.Embedding | None = None
        if model.table_tower(name).positions == "learned":
            rows = model.max_positions + self.offset
            self.positions = nn.Embedding(rows, d, dtype=config.params_dtype)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """int64 [B, S] twice -> [S, B, d] (S / TP with sequence parallelism)."""
        words = self.tokens(tokens)
        if self.positions is None:
            return words if self.sequence_parallel else words.transpose(0, 1).contiguous()
        places = self.positions(positions + self.offset).transpose(0, 1)
        if not self.sequence_parallel:
            # A stage sends a tower's states as they lie in memory; the sum would leave them turned.
            return (words.transpose(0, 1) + places).contiguous()
        places = places.contiguous()
        return words + tensor_parallel.scatter_to_sequence_parallel_region(places, group=self.group)


def num_real_rows(vocab_size: int, world: World) -> int:
    """This rank's rows of a token table that are no padding."""
    local = padded_vocabulary(vocab_size, world.tensor.size) // world.tensor.size
    return max(0, min(local, vocab_size - world.tensor.rank * local))


def text_rows(model: ModelConfig, world: World) -> tuple[int, int]:
    """Start and stop of this rank's rows of text ids."""
    local = padded_vocabulary(model.vocab_size, world.tensor.size) // world.tensor.size
    first, count = model.text_ids
    start, stop = (
        min(max(place - world.tensor.rank * local, 0), local) for place in (first, first + count)
    )
    return start, stop
