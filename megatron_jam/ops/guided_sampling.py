"""Guidance, temperature, top-k, top-p and min-p in one draw per row: faces of the operators."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from megatron_jam.config.log import logger
from megatron_jam.ops import extension
from megatron_jam.ops.reference import Settings

# Not so where the extension was compiled without nvcc, against a torch that has CUDA.
_HAS_CUDA_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key(
    "megatron_jam::guided_sample", "CUDA"
)

Legal = Tensor | tuple[int, int] | None
"""Which ids may be drawn: None, all; (begin, end), the ids begin..end-1 of every row; int64
[rows, 2], such a range for each row; bool [rows, V] or [V], a mask. What is not legal may hold
anything, NaN too."""


class GuidedSample(NamedTuple):
    """What was drawn, a row each."""

    tokens: Tensor
    """Ids, int64 [rows]."""

    log_probability: Tensor
    """Natural logarithm of the token's probability under the guided, tempered logits, before top-k,
    top-p and min-p; float32 [rows]. 0 where the temperature is 0."""

    truncated_log_probability: Tensor | None
    """The same under the distribution it was drawn from, behind the filters; None if not asked."""


def guided_sample(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    min_p: float | Tensor = 0.0,
    legal: Legal = None,
    seed: int | Tensor,
    offset: int | Tensor,
    truncated_log_probability: bool = False,
) -> GuidedSample:
    """Draw one token id per row from what the filters leave of the guided logits.

    z = (u + guidance_scale (c - u)) / temperature over the legal ids (paper Eq. 6). Filters, in the
    order of transformers: an id is kept by top-k if fewer than k of z are strictly larger, by top-p
    if the strictly larger ones have less than top_p of the probability that top-k left, by min-p if
    its probability is at least min_p of the largest: ties stay together, the largest is kept. The
    draw is a function of the row and of its (seed, offset) alone: the same on CPU and CUDA, in any
    batch, on any number of threads. Weights are relative to the row's largest, rounded to multiples
    of 2^-36: less likely ids are never drawn, those of one weight are ties. See ops/reference.py.

    Args:
        cond: logits with the condition [rows, V], V <= 2^17; float32, bfloat16 or float16.
        uncond: logits without it, same shape and dtype; None: no guidance, z = c / temperature.
            An id with -inf in either of the two is never drawn.
        guidance_scale: 1 samples from `cond`, 0 from `uncond`. This and the next four are one
            number, or one a row (a tensor [rows]).
        temperature: 0 is greedy: the largest z, by the lower id where two are equal.
        top_p, top_k, min_p: in (0, 1], a whole number >= 0, in [0, 1]; 1, 0, 0 keep every id.
        legal: which ids may be drawn. A range reads and computes nothing of the rest.
        seed: any 64-bit integer for each row, int64 [rows]; an int for a single row.
        offset: the number of the draw in the seed's stream, int64 [rows] or an int for all rows.
        truncated_log_probability: whether that is wanted too; it takes further passes.

    Raises:
        ValueError: a row (named) has a NaN or +inf on a legal id, or no legal id above -inf, or a
            setting out of its range; or an argument has a wrong shape, dtype or device. On CUDA
            this check waits for the kernel.
    """
    if not is_compiling():
        drawn = extension.guided_sample(
            cond,
            uncond,
            guidance_scale,
            temperature,
            top_p,
            top_k,
            min_p,
            legal,
            seed,
            offset,
            truncated_log_probability,
        )
        if drawn is not None:
            return GuidedSample._make(drawn)
    settings = Settings(guidance_scale, temperature, top_p, top_k, min_p)
    return _by_operator(cond, uncond, settings, legal, seed, offset, truncated_log_probability)


def _by_operator(
    cond: Tensor,
    uncond: Tensor | None,
    settings: Settings,
    legal: Legal,
    seed: int | Tensor,
    offset: int | Tensor,
    truncated: bool,
) -> GuidedSample:
    """:func:`guided_sample` where something is to see an operator, and on CUDA."""
    arguments = _arguments(cond, uncond, settings, legal)
    if isinstance(seed, int) and cond.shape[0] != 1:
        raise ValueError(
            f"guided_sample: {len(cond)} rows would share one stream of random numbers; "
            "give a seed to each row (int64 [rows])"
        )
    if isinstance(seed, int) and isinstance(offset, int):
        draws = (seed, offset, None)
    else:
        draws = (0, 0, columns_of((seed, offset), cond, torch.int64))
    drawn = _call("guided_sample", *arguments, *draws, truncated)
    return GuidedSample(*drawn) if truncated else GuidedSample(*drawn[:2], None)


def truncated_probabilities(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    legal: Legal = None,
    **settings: float | Tensor,
) -> Tensor:
    """The probabilities that :func:`guided_sample` draws from, for speculative or contrastive use.

    Arguments, :class:`Settings` and errors are those of :func:`guided_sample`. Where the
    temperature is 0 one id has all.

    Returns:
        float32 [rows, V]; exactly 0 for what is not legal or not kept.
    """
    return _call("guided_probabilities", *_arguments(cond, uncond, Settings(**settings), legal))


def largest_logit(cond: Tensor, uncond: Tensor | None, settings: Settings, legal: Legal) -> tuple:
    """The largest guided logit of each row and its id; a part of sharded sampling.

    Returns:
        float32 [rows] and int64 [rows]; the id is negative where a row has none: a RowError of
        csrc/include/jam/guided_sampling.h.
    """
    return _call("guided_largest", *_arguments(cond, uncond, settings, legal))


def weights_below(
    largest: Tensor, cond: Tensor, uncond: Tensor | None, settings: Settings, legal: Legal
) -> Tensor:
    """Weights float32 [rows, V] relative to a logit for each row; a part of sharded sampling."""
    return _call("guided_weights", *_arguments(cond, uncond, settings, legal), largest)


def _arguments(
    cond: Tensor, uncond: Tensor | None, settings: Settings, legal: Legal
) -> tuple[Any, ...]:
    """What all operators begin with: numbers as they are, tensors as one table of all rows."""
    if cond.dim() != 2:
        raise ValueError(f"guided_sample: cond has shape {list(cond.shape)}, not [rows, V]")
    guidance_scale = settings.guidance_scale
    if uncond is None and (isinstance(guidance_scale, Tensor) or guidance_scale != 1):
        raise ValueError(
            "guided_sample: guidance_scale needs uncond, the logits to guide away from"
        )
    table = None
    for each in settings:
        if isinstance(each, Tensor):
            table = columns_of(settings, cond, torch.float64)
            settings = Settings()
            break
    begin, end = 0, cond.shape[1]
    if legal is None:
        pass
    elif isinstance(legal, Tensor):
        if legal.dtype != torch.int64:
            legal = legal.expand(cond.shape)
    else:
        (begin, end), legal = legal, None
    return cond, uncond, *settings, table, begin, end, legal


def columns_of(values: tuple[float | Tensor, ...], cond: Tensor, dtype: torch.dtype) -> Tensor:
    """A table [rows, len(values)]."""
    rows = len(cond)
    columns = []
    for value in values:
        column = torch.as_tensor(value, dtype=dtype, device=cond.device)
        if column.dim() > 1 or column.numel() not in (1, rows):
            raise ValueError(
                f"guided_sample: a setting has shape {list(column.shape)}; "
                f"it must be a number or have one for each of {rows} rows"
            )
        columns.append(column.expand(rows))
    return torch.stack(columns, dim=1)


def _call(name: str, cond: Tensor, *others):
    if cond.is_cuda and not _HAS_CUDA_KERNEL:
        return _on_cpu(name, cond, *others)
    return getattr(torch.ops.megatron_jam, name).default(cond, *others)


def _on_cpu(name: str, cond: Tensor, *others):
    """The same by the CPU's kernel."""
    _say_once("the extension was built without CUDA: tokens are drawn on the CPU")
    arguments = (each.cpu() if isinstance(each, Tensor) else each for each in (cond, *others))
    results = getattr(torch.ops.megatron_jam, name).default(*arguments)
    if isinstance(results, Tensor):
        return results.to(cond.device)
    return tuple(each.to(cond.device) for each in results)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _fake(name: str):
    return torch.library.register_fake(f"megatron_jam::{name}")


@_fake("guided_sample")
def _fake_sample(cond: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    rows, truncated = len(cond), others[-1]
    return (
        cond.new_empty(rows, dtype=torch.int64),
        cond.new_empty(rows, dtype=torch.float32),
        cond.new_empty(rows if truncated else 0, dtype=torch.float32),
    )


@_fake("guided_largest")
def _fake_largest(cond: Tensor, *_) -> tuple[Tensor, Tensor]:
    rows = len(cond)
    return cond.new_empty(rows, dtype=torch.float32), cond.new_empty(rows, dtype=torch.int64)


@_fake("guided_probabilities")
@_fake("guided_weights")
def _fake_rows(cond: Tensor, *_) -> Tensor:
    return cond.new_empty(cond.shape, dtype=torch.float32)
