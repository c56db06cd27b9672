"""Guided sampling of logits whose vocabulary is split over ranks: the very tokens of the whole.

A rank reads its own logits alone. Weights are integers with exact sums, so what ranks add up is
what one rank would; a row takes some 50 bytes from each rank, and 24 more in the few rounds that
reject, in place of its logits.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jam.ops.guided_sampling import (
    GuidedSample,
    Legal,
    columns_of,
    guided_sample,
    largest_logit,
    weights_below,
)
from megatron_jam.ops.reference import WEIGHT_BITS, Settings, philox_uniform

_DIGIT_BITS = 4  # of a step of the search for a floor: 16 sums and counts, 256 bytes a row
_ONE = 0x3F800000  # bits of 1.0, the least weight above 0


def guided_sample_sharded(
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    legal: Legal = None,
    seed: Tensor,
    offset: int | Tensor,
    truncated_log_probability: bool = False,
    **settings: float | Tensor,
) -> GuidedSample:
    """Draw what :func:`megatron_jam.ops.guided_sampling.guided_sample` draws from whole rows.

    All ranks of `group` call this with the same rows and settings, and get the same. Top-k and the
    truncated log-probability each take eight further messages of 256 bytes a row.

    Args:
        cond: this rank's logits [rows, V / ranks]: ranks have equal shares of ids, in their order.
        uncond: as cond, or None.
        group: the ranks that share the vocabulary.
        legal: a mask of this rank's ids, or a range or ranges of ids of the whole vocabulary.
        seed: int64 [rows].
        offset: int64 [rows], or an int for all rows.
        truncated_log_probability: whether that is wanted too.
        settings: of :class:`megatron_jam.ops.reference.Settings`.

    Raises:
        ValueError: as guided_sample, on all ranks.
    """
    if group.size() == 1:
        asked = {"truncated_log_probability": truncated_log_probability, **settings}
        return guided_sample(cond, uncond, legal=legal, seed=seed, offset=offset, **asked)
    each = Settings(**settings)
    first = group.rank() * cond.shape[1]
    legal = _own_range(legal, cond.shape[1], group)
    if isinstance(legal, tuple) and legal[0] >= 0:  # the rest of the share is not looked at
        own, legal = slice(*legal), None
        first, cond = first + own.start, cond[:, own]
        uncond = None if uncond is None else uncond[:, own]
    logits, ids = largest_logit(cond, uncond, each, legal)
    largest, greedy = _largest(logits, torch.where(ids < 0, ids, ids + first), group)
    rows = _Rows(weights_below(largest, cond, uncond, each, legal), first, group)
    _, temperatures, top_ps, top_ks, min_ps = columns_of(each, cond, torch.float64).unbind(1)

    total = rows.sums.sum(1)
    floor, nucleus = rows.before_top_p(top_ps, top_ks, min_ps)
    numbers = columns_of((seed, offset), cond, torch.int64).tolist()
    tokens, weights = rows.draw(floor, nucleus, top_ps == 1, numbers)

    is_greedy = temperatures == 0
    tokens = torch.where(is_greedy, greedy, tokens)
    whole = torch.where(is_greedy, 0.0, (weights / total).log()).float()
    if not truncated_log_probability:
        return GuidedSample(tokens, whole, None)
    quota = torch.where(top_ps < 1, nucleus, math.inf)
    floor = torch.maximum(floor, rows.floor_of(quota, torch.full_like(quota, math.inf)))
    left = rows.sums_above(floor).sum(1)
    return GuidedSample(tokens, whole, torch.where(is_greedy, 0.0, (weights / left).log()).float())


class _Rows:
    """This rank's weights float32 [rows, ids], of the ids from `first` on, and what all ranks know
    of all of them."""

    def __init__(self, weights: Tensor, first: int, group: dist.ProcessGroup) -> None:
        self.weights, self.first, self.group = weights, first, group
        self.sums = _gather(weights.sum(1, dtype=torch.float64), group)
        """Of each rank's weights, float64 [rows, ranks]."""

    def sums_above(self, floor: Tensor) -> Tensor:
        """The sum of each rank's weights above `floor` [rows]: float64 [rows, ranks]."""
        above = torch.where(self.weights > floor[:, None], self.weights, 0.0)
        return _gather(above.sum(1, dtype=torch.float64), self.group)

    def before_top_p(self, top_ps: Tensor, top_ks: Tensor, min_ps: Tensor) -> tuple[Tensor, Tensor]:
        """The floor that top-k and min-p set, float32 [rows], and the sum below which larger
        weights must stay, float64 [rows]."""
        floor, kept_sum = _min_p_floor(min_ps), self.sums.sum(1)
        if bool((top_ks > 0).any()):
            quota = torch.where(top_ks > 0, top_ks, math.inf)
            kept = self.floor_of(torch.full_like(quota, math.inf), quota)
            kept_sum = self.sums_above(kept).sum(1)
            floor = torch.maximum(floor, kept)
        return floor, top_ps * kept_sum

    def draw(
        self, floor: Tensor, nucleus: Tensor, whole: Tensor, numbers: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Ids of the whole vocabulary, and their weights float64, both [rows]; by rejection.

        Args:
            floor: [rows]; drawn is from what is above.
            nucleus: a token is accepted if larger ones sum to less [rows]; `whole` rows accept any.
            numbers: (seed, offset) of each row.
        """
        sums = self.sums_above(floor) if bool((floor > 0).any()) else self.sums
        done = torch.zeros_like(whole)
        tokens = torch.zeros(len(floor), dtype=torch.int64, device=floor.device)
        weights = torch.ones_like(nucleus)
        for round_ in range(1 << 32):
            uniform = [philox_uniform(seed, offset, round_) for seed, offset in numbers]
            target = torch.tensor(uniform, dtype=torch.float64, device=floor.device) * sums.sum(1)
            ids, found = self._find(floor, sums, target)
            tokens, weights = torch.where(done, tokens, ids), torch.where(done, weights, found)
            floor = weights.float()
            sums = self.sums_above(floor)
            done = done | whole | (sums.sum(1) < nucleus)
            if bool(done.all()):
                return tokens, weights
        raise AssertionError("the floor rises each round, so the loop ends")

    def _find(self, floor: Tensor, sums: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The ids on which `target` falls and their weights, from the ranks that have them."""
        rank = self.group.rank()
        before = sums[:, :rank].sum(1)
        (own,) = torch.where((before <= target) & (target < before + sums[:, rank]))
        found = sums.new_zeros(len(sums), 2)
        if len(own):
            weights = self.weights[own]
            above = torch.where(weights > floor[own, None], weights, 0.0)
            past = above.cumsum(1, dtype=torch.float64) > (target - before)[own, None]
            index = past.int().argmax(1, keepdim=True)
            pair = (index + self.first).double(), weights.gather(1, index).double()
            found[own] = torch.cat(pair, dim=1)
        dist.all_reduce(found, group=self.group)
        return found[:, 0].long(), found[:, 1]

    def floor_of(self, sum_quota: Tensor, count_quota: Tensor) -> Tensor:
        """The floor of the largest weights that reach one of two quotas; float32 [rows].

        Goes digit by digit, from the top, through the bits of the weights.
        """
        keys = self.weights.view(torch.int32) - _ONE
        prefix = torch.zeros(len(keys), dtype=torch.int32, device=keys.device)
        passed = torch.zeros(len(keys), 2, dtype=torch.float64, device=keys.device)
        quotas = torch.stack([sum_quota, count_quota], dim=1)[:, None]
        reached = torch.ones_like(prefix, dtype=torch.bool)
        for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            buckets = self._buckets(keys, shift, prefix)
            # Sums and counts of what is at or above each bucket.
            running = buckets.flip(1).cumsum(1).flip(1) + passed[:, None]
            enough = (running >= quotas).any(2)
            reached &= enough[:, 0]
            digit = enough.int().sum(1) - 1  # the highest one that is enough
            digit = digit.clamp(min=0)
            above = torch.cat([running[:, 1:], passed[:, None]], dim=1)
            passed = above.gather(1, digit[:, None, None].expand(-1, 1, 2))[:, 0]
            prefix = (prefix << _DIGIT_BITS) | digit.int()
        floor = (prefix + (_ONE - 1)).view(torch.float32)
        return torch.where(reached, floor, 0.0)

    def _buckets(self, keys: Tensor, shift: int, prefix: Tensor) -> Tensor:
        """Sums and counts of the weights with `prefix`, by their next digit: [rows, 16, 2]."""
        upper = keys >> shift
        inside = (self.weights > 0) & (upper >> _DIGIT_BITS == prefix[:, None])
        digit = torch.where(inside, upper & ((1 << _DIGIT_BITS) - 1), 0).long()
        values = torch.stack([self.weights, torch.ones_like(self.weights)], dim=2).double()
        values = values * inside[:, :, None]
        buckets = values.new_zeros(len(keys), 1 << _DIGIT_BITS, 2)
        buckets.scatter_add_(1, digit[:, :, None].expand(-1, -1, 2), values)
        dist.all_reduce(buckets, group=self.group)
        return buckets


def _largest(logits: Tensor, ids: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The largest logit of whole rows and its id: the lower one of equals."""
    pairs = _gather(torch.stack([logits.double(), ids.double()], dim=1), group)  # [rows, ranks, 2]
    for row, errors in enumerate(pairs[:, :, 1].tolist()):
        wrong = [int(each) for each in errors if each < 0]
        if wrong and (set(wrong) != {-2} or len(wrong) == len(errors)):
            raise ValueError(f"row {row}: {_MEANINGS[max(wrong, key=lambda each: each != -2)]}")
    rank = pairs[:, :, 0].argmax(1)
    # argmax takes any of equals: the first rank that has the largest.
    rank = (pairs[:, :, 0] == pairs.gather(1, rank[:, None, None].expand(-1, 1, 2))[:, :, 0]).int()
    rank = rank.argmax(1)
    found = pairs.gather(1, rank[:, None, None].expand(-1, 1, 2))[:, 0]
    return found[:, 0].float(), found[:, 1].long()


_MEANINGS = {  # of RowError
    -1: "a logit of a legal id is NaN or +inf",
    -2: "no legal id has a logit above -inf",
    -3: "temperature must be >= 0, top_p in (0, 1], top_k a whole number >= 0, min_p in [0, 1], and"
    " guidance_scale finite",
    -4: "the range of legal ids must be within the vocabulary",
}


def _min_p_floor(min_p: Tensor) -> Tensor:
    """min_p_floor of csrc/include/jam/weights.h: what is above is at least min_p 2^36."""
    least = min_p * 2.0**WEIGHT_BITS
    floor = least.float()
    up = torch.nextafter(floor, torch.full_like(floor, math.inf))
    floor = torch.where(floor.double() < least, up, floor)
    return torch.nextafter(floor, torch.zeros_like(floor))


def _own_range(legal: Legal, share: int, group: dist.ProcessGroup) -> Legal:
    """A range of the whole vocabulary as one of this rank's ids; masks are already."""
    if legal is None or (isinstance(legal, Tensor) and legal.dtype != torch.int64):
        return legal
    ranges = torch.as_tensor(legal, dtype=torch.int64)
    within = (ranges[..., 0] >= 0) & (ranges[..., 0] <= ranges[..., 1])
    within &= ranges[..., 1] <= share * group.size()
    own = (ranges - group.rank() * share).clamp(0, share)
    # What is not within the whole is not within a part either: the operator says so.
    own = torch.where(within[..., None], own, -1)
    return own if isinstance(legal, Tensor) else (int(own[0]), int(own[1]))


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What each rank has, [rows, ...], as [rows, ranks, ...]."""
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts, dim=1)
