"""Output rows and cross-entropy in one, over a vocabulary that tensor parallelism splits.

The logits of a long batch are its largest tensor by far. Here they live for a few tokens at a time:
their loss and, in the same pass, the gradients of what they were made from.
Megatron's own cross-entropy casts float64 to fp32, reads a global group, counts padded rows and
holds all logits. Letters: T tokens, d width, v this rank's share of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jam.models.main_gradients import added

LOGITS_AT_ONCE = 1 << 24
"""How many logits of a rank exist at a time (64 MiB in fp32)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A run of output rows, and which hidden state they are multiplied with."""

    start: int
    """First row of this rank's share."""

    stop: int
    """Row behind the last."""

    hidden: int
    """Number of the hidden state."""

    table: int
    """Number of the table that holds the rows."""

    def logits(self, hidden: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
        """[..., d] of each hidden state, [v, d] of each table -> [..., stop - start]."""
        return hidden[self.hidden] @ tables[self.table][self.start : self.stop].T


def linear_cross_entropy(
    hidden: Sequence[Tensor],
    tables: Sequence[Tensor],
    readings: Sequence[Reading],
    labels: Tensor,
    mask: Tensor,
    *,
    num_real: int,
    group: dist.ProcessGroup,
    z_loss: float = 0.0,
    main_gradients: bool = False,
    reports: bool = True,
    at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label.

    With `z_loss` the sum has z_loss * (log Z)^2 of each token besides, Z the softmax's denominator,
    which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5; Chameleon has 1e-5).

    Args:
        hidden: [T, d] each, the same on every rank of `group`; their gradients are this rank's
            part of a sum.
        tables: this rank's output rows, [v, d] each; rank r holds ids r*v ... r*v + v - 1.
        readings: which rows read what; together they are all v rows.
        labels: int64 [T], the same on every rank.
        mask: float [T]; weight of each token in the sum.
        num_real: rows of this rank that are no padding.
        group: the tensor-parallel ranks.
        z_loss: weight of the squared logarithm of the denominator.
        main_gradients: add the tables' gradients to the sums of Megatron's wrapper, in the forward
            pass already.
        reports: whether the wrapper hears of that from here, and not from another use of the same
            tables.
        at_once: how many logits exist at a time, the same on every rank.

    Returns:
        Nats in fp32 (float64 for float64 states): the weighted sum, a scalar that alone carries a
        gradient, and each token's negative log-likelihood [T], without `z_loss`.

    Raises:
        RuntimeError: in a backward pass that begins with a multiple of the sum, for which
            `main_gradients` come too early.
    """
    settings = _Settings(
        readings=readings,
        num_real=num_real,
        group=group,
        z_loss=z_loss,
        in_main=main_gradients,
        reports=reports,
        num_tokens=max(1, at_once // len(tables[0])),
        num_hidden=len(hidden),
        # In `forward` gradients are off, whether they are wanted or not.
        wanted=[torch.is_grad_enabled() and each.requires_grad for each in (*hidden, *tables)],
    )
    return _LinearCrossEntropy.apply(labels, mask, settings, *hidden, *tables)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What is no tensor; the names are those of `linear_cross_entropy`."""

    readings: Sequence[Reading]
    num_real: int
    group: dist.ProcessGroup
    z_loss: float
    in_main: bool
    reports: bool
    num_tokens: int
    """How many have their logits at a time."""

    num_hidden: int
    wanted: Sequence[bool]
    """Which hidden states and tables need gradients."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, labels: Tensor, mask: Tensor, settings: _Settings, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, tables = tensors[: settings.num_hidden], tensors[settings.num_hidden :]
        exact = torch.promote_types(hidden[0].dtype, torch.float32)
        sums = _sums(tensors, settings, exact)
        losses, log_z = hidden[0].new_empty(2, len(labels), dtype=exact)
        mask = mask.to(exact)
        for first in range(0, len(labels), settings.num_tokens):
            some = slice(first, first + settings.num_tokens)
            rows = [each[some] for each in hidden]
            parts = [each.logits(rows, tables) for each in settings.readings]
            logits = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).to(exact)
            del parts
            logits[:, settings.num_real :] = -torch.inf
            slopes = logits  # they take the logits' place
            losses[some], log_z[some] = _softmax(logits, labels[some], mask[some], settings)
            if any(settings.wanted):
                slopes = slopes.to(hidden[0].dtype)
                _add_gradients(slopes, some, settings, tensors, sums)
        ctx.settings, ctx.tables = settings, tables
        returned = sums[: settings.num_hidden] if settings.in_main else sums
        ctx.gradients = [
            None if gradient is None else gradient.to(each.dtype)
            for gradient, each in zip(returned, tensors, strict=False)
        ]
        ctx.mark_non_differentiable(losses)
        total, z_loss = (losses * mask).sum(), settings.z_loss
        return total + z_loss * (log_z.square() * mask).sum() if z_loss else total, losses

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        settings = ctx.settings
        if settings.in_main:
            torch._assert_async(scale == 1, "a loss was scaled whose gradients are added already")
            of_tables = settings.wanted[settings.num_hidden :]
            for table, needed in zip(ctx.tables, of_tables, strict=True):
                gradients.append(added(table) if needed and settings.reports else None)
        # A pass over a table for nothing, where knowing the scale does not mean waiting for a GPU.
        elif scale.is_cuda or scale != 1:
            for each in gradients:
                if each is not None:
                    each *= scale
        return None, None, None, *gradients


def _softmax(
    logits: Tensor, labels: Tensor, mask: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Losses and log Z, [T] each, of logits [T, v], whose gradients of the sum take their place:
    mask * ((1 + 2 z_loss log Z) softmax - one-hot)."""
    group, z_loss = settings.group, settings.z_loss
    top = logits.amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    logits -= top[:, None]
    local = labels - dist.get_rank(group) * logits.shape[1]
    mine = (local >= 0) & (local < logits.shape[1])
    local = torch.where(mine, local, 0)[:, None]
    sums = logits.new_zeros(2, len(labels))
    sums[1] = torch.where(mine, logits.gather(1, local)[:, 0], 0)
    sums[0] = logits.exp_().sum(-1)
    dist.all_reduce(sums, group=group)
    below = sums[0].log()
    log_z = below + top
    logits *= (mask * (1 + 2 * z_loss * log_z) / sums[0])[:, None]
    logits.scatter_add_(1, local, -(mine * mask)[:, None])
    return below - sums[1], log_z


def _sums(
    tensors: Sequence[Tensor], settings: _Settings, dtype: torch.dtype
) -> list[Tensor | None]:
    """What gradients of hidden states and tables are added to, None where they are not wanted."""
    # With several tables or states a rank's readings leave parts of them out.
    allocate = torch.zeros_like if len(tensors) > 2 else torch.empty_like
    in_main = [settings.in_main and n >= settings.num_hidden for n in range(len(tensors))]
    return [
        None if not needed else each.main_grad if main else allocate(each, dtype=dtype)
        for each, needed, main in zip(tensors, settings.wanted, in_main, strict=True)
    ]


def _add_gradients(
    slopes: Tensor,
    some: slice,
    settings: _Settings,
    tensors: Sequence[Tensor],
    sums: Sequence[Tensor | None],
) -> None:
    """Add what the logits of `some` tokens give to hidden states' and tables' gradients."""
    several = len(tensors) > 2
    for each in settings.readings:
        rows, table = slice(each.start, each.stop), settings.num_hidden + each.table
        slope = slopes[:, rows]
        of_hidden, of_table = sums[each.hidden], sums[table]
        if of_hidden is not None:
            _put_product(of_hidden[some], slope, tensors[table][rows], adds=several)
        if of_table is not None:
            adds = several or settings.in_main or some.start > 0
            _put_product(of_table[rows], slope.T, tensors[each.hidden][some], adds=adds)


def _put_product(total: Tensor, left: Tensor, right: Tensor, *, adds: bool) -> None:
    if total.dtype is left.dtype:
        total.addmm_(left, right, beta=int(adds))
    elif adds:
        total += left @ right
    else:
        total.copy_(left @ right)
