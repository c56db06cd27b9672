"""The towers' last states -> logits, or their loss without ever holding all logits at once."""

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.config.model import IMAGE, MAIN, TEXT, ModelConfig
from megatron_jam.models.embedding import num_real_rows, text_rows
from megatron_jam.models.layers import build_norm
from megatron_jam.models.loss import Reading, linear_cross_entropy
from megatron_jam.models.parameters import padded_vocabulary
from megatron_jam.parallel.world import World


class Head(nn.Module):
    """One hidden state for all rows of the output, or one for the rows of each tower's ids."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, world: World, *, reads_tables: bool
    ) -> None:
        """Build it; if it `reads_tables` the rows are the embedding's, given to each call."""
        super().__init__()
        self.readers = nn.ModuleDict({name: Reader(model, name, config) for name in model.readers})
        local = padded_vocabulary(model.vocab_size, world.tensor.size) // world.tensor.size
        self.tables = nn.ParameterDict()
        for name in () if reads_tables else model.table_names:
            shape = (local, model.table_width(name))
            self.tables[name] = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        self.group = world.groups.tp
        self.sequence_parallel = config.sequence_parallel
        self.num_real = num_real_rows(model.vocab_size, world)
        self.main_gradients = config.gradient_accumulation_fusion
        self.readings = _readings(model, world, local)

    def logits(self, states: tuple[Tensor, ...], tables: list[nn.Parameter] | None) -> Tensor:
        """[S, B, d] of each tower -> this rank's logits [S, B, padded V / TP]."""
        hidden, rows = self._hidden(states), tables or list(self.tables.values())
        return torch.cat([each.logits(hidden, rows) for each in self.readings], dim=-1)

    def loss(
        self,
        states: tuple[Tensor, ...],
        tables: list[nn.Parameter] | None,
        labels: Tensor,
        mask: Tensor,
        *,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the masked losses, and every position's.

        Args:
            states: [S, B, d] of each tower (S / TP with sequence parallelism).
            tables: the embedding's, if the head reads them.
            labels: int64 [B, S].
            mask: float32 [B, S]; what each position counts.
            z_loss: see `linear_cross_entropy`.

        Returns:
            Nats: the sum, a scalar, and [B, S] without a gradient; see `linear_cross_entropy`.
        """
        total, losses = linear_cross_entropy(
            [each.flatten(0, 1) for each in self._hidden(states)],
            tables or list(self.tables.values()),
            self.readings,
            labels.T.flatten(),
            mask.T.flatten(),
            num_real=self.num_real,
            group=self.group,
            z_loss=z_loss,
            main_gradients=self.main_gradients,
            reports=bool(self.tables),  # else the embedding does, whose backward pass comes later
        )
        return total, losses.view_as(labels.T).T.contiguous()

    def _hidden(self, states: tuple[Tensor, ...]) -> list[Tensor]:
        """What each reader reads, of all positions."""
        hidden = [reader(states) for reader in self.readers.values()]
        if self.sequence_parallel:
            gather = tensor_parallel.gather_from_sequence_parallel_region
            return [gather(each, group=self.group) for each in hidden]
        copy = tensor_parallel.copy_to_tensor_model_parallel_region
        return [copy(each, group=self.group) for each in hidden]


class Reader(nn.Module):
    """The towers' states -> what output rows are multiplied with."""

    def __init__(self, model: ModelConfig, name: str, config: TransformerConfig) -> None:
        super().__init__()
        self.tower = model.tower_names.index(name) if name != MAIN else 0
        self.takes_all = model.is_pair and model.head == "project"
        table = model.table_of(name)
        width = model.table_width(table)
        source = model.joint_size if self.takes_all else None
        if model.is_pair and not self.takes_all and model.towers[name].hidden_size != width:
            source = model.towers[name].hidden_size
        self.projection: nn.Linear | None = None
        if source is not None:
            self.projection = nn.Linear(source, width, bias=False, dtype=config.params_dtype)
            self.projection.weight.sequence_parallel = config.sequence_parallel
        tower = model.table_tower(table) if self.takes_all else model.table_tower(name)
        self.norm = build_norm(tower, config)

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """[S, B, d] of each tower -> [S, B, width of the output's rows]."""
        if self.takes_all:
            assert self.projection is not None
            return self.norm(F.linear(torch.cat(states, dim=-1), self.projection.weight))
        hidden = self.norm(states[self.tower])
        return hidden if self.projection is None else F.linear(hidden, self.projection.weight)


def _readings(model: ModelConfig, world: World, local: int) -> list[Reading]:
    """Which of this rank's rows read what, in the order of the rows."""
    if model.readers == (MAIN,):
        return [Reading(start=0, stop=local, hidden=0, table=0)]
    start, stop = text_rows(model, world)
    tables = {name: i for i, name in enumerate(model.table_names)}
    readers = {name: i for i, name in enumerate(model.readers)}
    bounds = [(0, start, IMAGE), (start, stop, TEXT), (stop, local, IMAGE)]
    return [
        Reading(start=a, stop=b, hidden=readers[name], table=tables.get(name, 0))
        for a, b, name in bounds
        if a < b
    ]
