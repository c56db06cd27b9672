"""The kernels of csrc in plain torch, one row at a time: their specification, to the bit.

Every float32 operation is rounded by itself or fused where :func:`fused` says so, and weights are
integers whose float64 sums are exact in any order, so that a draw is the same on every backend.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

WEIGHT_BITS = 36  # the largest logit of a row weighs 2^36; 2^17 ids sum exactly in float64
SMALLEST_EXPONENT = -40.0  # what is below weighs less than a half, so nothing
# 2^f = 1 + f (c1 + f (c2 + ...)) for |f| <= 1/2, minimax to 1.1e-7 relative; from c5 to c1, exact
# in float32.
EXP2_COEFFICIENTS = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
)


class Settings(NamedTuple):
    """How rows are drawn from: each a number for all of them, or one for each (a tensor [rows])."""

    guidance_scale: float | Tensor = 1.0
    """1 samples from the conditional logits, 0 from the unconditional ones."""
    temperature: float | Tensor = 1.0
    """0 is greedy: the largest logit, by the lower id where two are equal."""
    top_p: float | Tensor = 1.0
    """In (0, 1]; 1 keeps every id."""
    top_k: float | Tensor = 0
    """A whole number >= 0; 0 keeps every id."""
    min_p: float | Tensor = 0.0
    """In [0, 1]; 0 keeps every id."""


class Drawn(NamedTuple):
    """What one row yields; see :class:`megatron_jam.ops.guided_sampling.GuidedSample`."""

    token: int
    log_probability: float
    truncated_log_probability: float


def guided_sample_row(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    legal: Tensor | None = None,
    seed: int,
    offset: int,
    **settings: float,
) -> Drawn:
    """The draw of :func:`megatron_jam.ops.guided_sampling.guided_sample` for one row.

    A draw is by rejection: draw among the weights above a floor; the id is in the nucleus if the
    strictly larger weights sum to less than top_p of what top-k kept; if not, its weight is the new
    floor.

    Args:
        cond: logits [V]; float32, bfloat16 or float16, as is `uncond`.
        legal: bool [V], or None: every id.
        settings: of :class:`Settings`, numbers.

    Raises:
        ValueError: the row has no largest logit, or a setting is out of its range.
    """
    weights, filters = _weights_and_filters(cond, uncond, legal, Settings(**settings))
    floor, nucleus = before_top_p(weights, **filters)
    for round_ in range(1 << 32):
        running = torch.where(weights > floor, weights, 0.0).cumsum(0)
        target = philox_uniform(seed, offset, round_) * float(running[-1])
        token = int((running > target).nonzero()[0, 0])
        floor = float(weights[token])
        if float(weights[weights > floor].sum()) < nucleus:
            break
    whole, left = float(weights.sum()), float(kept_weights(weights, **filters).sum())
    weight = float(weights[token])
    return Drawn(token, math.log(weight / whole), math.log(weight / left))


def truncated_probabilities_row(
    cond: Tensor, uncond: Tensor | None = None, *, legal: Tensor | None = None, **settings: float
) -> Tensor:
    """What :func:`guided_sample_row` draws from: float32 [V]."""
    weights, filters = _weights_and_filters(cond, uncond, legal, Settings(**settings))
    kept = kept_weights(weights, **filters)
    return (kept / kept.sum()).float()


def _weights_and_filters(
    cond: Tensor, uncond: Tensor | None, legal: Tensor | None, settings: Settings
) -> tuple[Tensor, dict]:
    """Weights float64 [V], and the settings that choose among them."""
    check_settings(*settings)
    logits = guided_logits(cond, uncond, guidance_scale=settings.guidance_scale, legal=legal)
    check_logits(logits)
    weights = sampling_weights(logits, temperature=settings.temperature)
    return weights, {name: getattr(settings, name) for name in ("top_p", "top_k", "min_p")}


def kept_weights(weights: Tensor, *, top_p: float, top_k: int, min_p: float) -> Tensor:
    """The weights [V] that all filters keep, 0 for the others."""
    floor, nucleus = before_top_p(weights, top_p=top_p, top_k=top_k, min_p=min_p)
    ascending, order = weights.sort(stable=True)
    # The sum of the strictly larger weights: all that stand behind the last of equal ones.
    ends = torch.searchsorted(ascending, ascending, right=True)
    larger = ascending.sum() - ascending.cumsum(0)[ends - 1]
    in_nucleus = torch.empty_like(weights, dtype=torch.bool)
    in_nucleus[order] = larger < nucleus
    return torch.where(in_nucleus & (weights > floor), weights, 0.0)


def before_top_p(weights: Tensor, *, top_p: float, top_k: int, min_p: float) -> tuple[float, float]:
    """The floor that top-k and min-p set, and the sum below which larger weights must stay."""
    least = min_p * 2.0**WEIGHT_BITS
    top = weights
    if 0 < top_k < len(weights):
        kth = weights.sort(descending=True).values[top_k - 1]
        top = torch.where(weights >= kth, weights, 0.0)
        least = max(least, float(kth))
    below = weights[weights < least]
    return float(below.max()) if len(below) else 0.0, top_p * float(top.sum())


def check_settings(
    guidance_scale: float, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    """Raise ValueError where a setting is out of its range."""
    right = temperature >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1 and top_k >= 0
    if not (right and math.isfinite(guidance_scale + temperature)):
        raise ValueError(
            "temperature must be >= 0, top_p in (0, 1], top_k a whole number >= 0, "
            "min_p in [0, 1], and guidance_scale finite"
        )


def check_logits(logits: Tensor) -> None:
    """Raise ValueError where a row has no largest logit."""
    if not bool((logits < math.inf).all()):
        raise ValueError("a logit of a legal id is NaN or +inf")
    if not bool((logits > -math.inf).any()):
        raise ValueError("no legal id has a logit above -inf")


def guided_logits(
    cond: Tensor, uncond: Tensor | None, *, guidance_scale: float, legal: Tensor | None
) -> Tensor:
    """u + guidance_scale (c - u) in float32 [V] (paper Eq. 6); -inf forbids, in either stream."""
    logits = cond.float()
    if uncond is not None:
        c, u = logits, uncond.float()
        logits = fused(torch.tensor(guidance_scale, dtype=torch.float32), c - u, u)
        logits = logits.masked_fill((c == -math.inf) | (u == -math.inf), -math.inf)
    return logits if legal is None else logits.masked_fill(~legal, -math.inf)


def sampling_weights(logits: Tensor, *, temperature: float) -> Tensor:
    """2^36 exp((logits - max) / temperature), rounded to integers, as float64 [V].

    Where the temperature is 0 the first of the largest has all.
    """
    if temperature == 0:
        weights = torch.zeros_like(logits, dtype=torch.float64)
        weights[(logits == logits.max()).nonzero()[0, 0]] = 2.0**WEIGHT_BITS
        return weights
    scale = torch.tensor(min(math.log2(math.e) / temperature, 2.0**127), dtype=torch.float32)
    exponent = (logits - logits.max()) * scale
    whole = exponent.clamp(min=SMALLEST_EXPONENT).round()
    fraction = exponent.clamp(min=SMALLEST_EXPONENT) - whole
    power = torch.full_like(fraction, EXP2_COEFFICIENTS[0])
    for coefficient in (*EXP2_COEFFICIENTS[1:], 1.0):
        power = fused(power, fraction, torch.tensor(coefficient, dtype=torch.float32))
    weights = torch.ldexp(power.double(), whole.double() + WEIGHT_BITS).round()
    return torch.where(exponent > SMALLEST_EXPONENT, weights, 0.0)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The float32 fused multiply-add: a b + c, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd (Boldo and Melquiond 2008,
    "Emulation of FMA and correctly rounded sums"), so that rounding it again to float32 is right.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # exact: Knuth's two-sum
    bits = total.view(torch.int64)
    inexact_even = (error != 0) & error.isfinite() & (bits % 2 == 0)
    towards_error = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact_even, bits + towards_error, bits).view(torch.float64).float()


def philox_uniform(seed: int, offset: int, round_: int) -> float:
    """A multiple of 2^-53 in [0, 1): the first 64 bits of Philox4x32-10 (Salmon et al. 2011).

    Counter: offset (two words of 32 bits, the lower one first), round, 0. Key: seed (two words).
    """
    mask = 0xFFFFFFFF
    x0, x1, x2, x3 = offset & mask, offset >> 32 & mask, round_ & mask, 0
    key0, key1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1 = product1 >> 32 ^ x1 ^ key0, product1 & mask
        x2, x3 = product0 >> 32 ^ x3 ^ key1, product0 & mask
        key0, key1 = key0 + 0x9E3779B9 & mask, key1 + 0xBB67AE85 & mask
    return ((x1 << 32 | x0) >> 11) * 2.0**-53


def retrieved_in_front(
    retrieved: Sequence[T], *, most: int, is_drawn: bool, seed: int, document: int
) -> list[T]:
    """Which retrieved documents a run lays out in front of `document`, and in which order.

    The beginning of a Fisher-Yates shuffle by Philox's numbers (seed, document, 0, 1, ...), of
    which the first says how many there are of 0 .. `most`, if that is drawn too.
    """
    if not retrieved:
        return []
    uniforms = (philox_uniform(seed, document, i) for i in itertools.count())
    left, number = list(retrieved), min(most, len(retrieved))
    if is_drawn:
        number = int(next(uniforms) * (number + 1))
    for i in range(number):
        j = i + int(next(uniforms) * (len(left) - i))
        left[i], left[j] = left[j], left[i]
    return left[:number]


def weighted_average(a: Tensor, b: Tensor, share: float) -> Tensor:
    """share * a + (1 - share) * b of one dtype, in fp32 for 16 bits and in fp64 for more."""
    exact = torch.float32 if a.dtype.itemsize == 2 else torch.float64
    weights = (torch.tensor(each, dtype=exact) for each in (share, 1 - share))
    of_a, of_b = (x.to(exact) * weight for x, weight in zip((a, b), weights, strict=True))
    return (of_a + of_b).to(a.dtype)


# Of the quantile of the normal distribution and of the logarithm, from the lowest power on.
QUANTILE_NEAR = (
    2.166818141937256,
    0.34724536538124084,
    -0.006543918512761593,
    -0.001620317343622446,
    0.00030377000803127885,
    -9.520093044557143e-06,
    -4.4225826059118845e-06,
    4.967770905750513e-07,
    2.7617229392262743e-08,
)
QUANTILE_FAR = (
    4.297974109649658,
    0.22164452075958252,
    -0.005189978983253241,
    0.00022937021276447922,
    -1.1198821994184982e-05,
    4.992754725208215e-07,
    -1.617156852873336e-09,
    -7.260082757198916e-09,
    8.295828468618538e-10,
)
LOGARITHM = (
    0.9999998211860657,
    -0.4999993145465851,
    0.3333798944950104,
    -0.25008025765419006,
    0.1979503035545349,
    -0.16412799060344696,
    0.1711122691631317,
    -0.15403155982494354,
)


def drawn(kind: str, key: int, start: int, count: int, scale: float) -> NDArray[np.float32]:
    """The numbers of :func:`megatron_jam.ops.draw.drawn`.

    Number i is word i % 64 // 16 of counter 16 (i // 64) + i % 16. Of its upper 23 bits n comes u =
    (2 n + 1) / 2^23 - 1, and of u the quantile of the normal distribution at (1 + u) / 2.
    """
    words = []
    for i in range(start, start + count):
        words.append(threefry(key, i // 64 * 16 + i % 16)[i % 64 // 16] >> 9)
    one = np.float32(1)
    u = (2 * np.array(words, dtype=np.int64) + 1).astype(np.float32) * np.float32(2.0**-23) - one
    if kind == "uniform":
        return np.float32(scale) * u
    u = u * np.float32(0.9973) if kind == "cut_normal" else u  # 3 sigma
    inside = (one - u) * (one + u)
    exponent = (inside.view(np.int32) - np.float32(2 / 3).view(np.int32)) >> 23
    rest = (inside.view(np.int32) - (exponent << 23)).view(np.float32) - one
    whole = exponent.astype(np.float32) * np.float32(math.log(2))
    w = -(whole + rest * _polynomial(LOGARITHM, rest))
    near = _polynomial(QUANTILE_NEAR, w - np.float32(2.625))
    far = _polynomial(QUANTILE_FAR, w - np.float32(10.275))
    use_far = (w > np.float32(5.25)) & (kind == "normal")
    return np.float32(scale) * (u * np.where(use_far, far, near))


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float32]) -> NDArray[np.float32]:
    value = np.full_like(x, coefficients[-1])
    for each in reversed(coefficients[:-1]):
        value = value * x + np.float32(each)
    return value


def threefry(key: int, counter: int) -> list[int]:
    """The four words of Threefry4x32-20 (Salmon et al. 2011). Counter and key: two words each, the
    lower one first, then zeros."""
    turns = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))
    mask = 0xFFFFFFFF
    keys = [key & mask, key >> 32, 0, 0]
    keys.append(0x1BD11BDA ^ keys[0] ^ keys[1])
    x = [counter & mask, counter >> 32, 0, 0]
    x = [word + each & mask for word, each in zip(x, keys, strict=False)]
    for step in range(20):
        pairs = ((0, 3), (2, 1)) if step % 2 else ((0, 1), (2, 3))
        for (low, high), turn in zip(pairs, turns[step % 8], strict=True):
            x[low] = x[low] + x[high] & mask
            x[high] = (x[high] << turn & mask | x[high] >> 32 - turn) ^ x[low]
        if step % 4 == 3:
            number = step // 4 + 1
            x = [word + keys[(number + k) % 5] & mask for k, word in enumerate(x)]
            x[3] = x[3] + number & mask
    return x
