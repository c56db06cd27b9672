"""Guidance, temperature and top-p in one draw per row: the public face of the compiled operator."""

import functools

import torch
from torch import Tensor

from megatron_jam.config.log import logger
from megatron_jam.ops import extension  # noqa: F401  (registers the operator)

# Not so where the extension was compiled without nvcc, against a torch that has CUDA.
_HAS_CUDA_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key(
    "megatron_jam::guided_sample", "CUDA"
)


def guided_sample(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    guidance_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
    legal: Tensor | None = None,
    seed: int | Tensor,
    offset: int | Tensor,
) -> Tensor:
    """Draw one token id per row from the nucleus of the guided logits.

    z = (u + guidance_scale (c - u)) / temperature over the legal ids (paper Eq. 6); an id is in the
    nucleus if the probability of all ids with strictly larger z is below `top_p`, so that ties stay
    together; one id of the nucleus is drawn by its probability. The draw is a function of the row
    and of its (seed, offset) alone: the same on CPU and CUDA, in any batch. Weights are relative to
    the largest of the row, rounded to multiples of 2^-36. Specification: ops/reference.py.

    Args:
        cond: logits with the condition [rows, V], V <= 2^17; float32, bfloat16 or float16.
        uncond: logits without it, same shape and dtype; None: no guidance, z = c / temperature.
            An id with -inf in either of the two is never drawn.
        guidance_scale: 1 samples from `cond`, 0 from `uncond`. This, `temperature` and `top_p` are
            one number, or one a row (a tensor [rows]).
        temperature: 0 is greedy: the largest z, by the lower id where two are equal.
        top_p: in (0, 1]; 1 keeps every id.
        legal: bool [rows, V] or [V]: which ids may be drawn; None: all. The others may hold NaN.
        seed: any 64-bit integer, or int64 [rows].
        offset: the number of the draw in the seed's stream, int64 [rows]; an int for a single row.

    Returns:
        Token ids, int64 [rows].

    Raises:
        ValueError: a row (named) has a NaN or +inf on a legal id, or no legal id above -inf, or a
            setting out of its range; or an argument has a wrong shape, dtype or device. On CUDA
            this check waits for the kernel.
    """
    if cond.dim() != 2:
        raise ValueError(f"guided_sample: cond has shape {list(cond.shape)}, not [rows, V]")
    if uncond is None and (isinstance(guidance_scale, Tensor) or guidance_scale != 1):
        raise ValueError(
            "guided_sample: guidance_scale needs uncond, the logits to guide away from"
        )
    if isinstance(seed, int) and isinstance(offset, int) and len(cond) > 1:
        raise ValueError(
            f"guided_sample: {len(cond)} rows would share one random number; "
            "give an offset to each row"
        )
    return _draw(
        cond,
        uncond,
        _per_row(guidance_scale, cond, torch.float64),
        _per_row(temperature, cond, torch.float64),
        _per_row(top_p, cond, torch.float64),
        None if legal is None else legal.expand(cond.shape),
        _per_row(seed, cond, torch.int64),
        _per_row(offset, cond, torch.int64),
    )


def _draw(cond: Tensor, *others: Tensor | None) -> Tensor:
    if cond.is_cuda and not _HAS_CUDA_KERNEL:
        return _on_cpu(cond, *others)
    return torch.ops.megatron_jam.guided_sample(cond, *others)


def _on_cpu(cond: Tensor, *others: Tensor | None) -> Tensor:
    """The same draws by the CPU's kernel."""
    _say_once("the extension was built without CUDA: tokens are drawn on the CPU")
    copies = (each if each is None else each.cpu() for each in (cond, *others))
    return torch.ops.megatron_jam.guided_sample(*copies).to(cond.device)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _per_row(value: float | Tensor, cond: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=cond.device).expand(len(cond))


@torch.library.register_fake("megatron_jam::guided_sample")
def _fake(cond: Tensor, *_: Tensor | None) -> Tensor:
    return cond.new_empty(cond.shape[:1], dtype=torch.int64)
