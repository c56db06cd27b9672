"""Kinds of tokens, what each counts in training, and the losses that are reported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jam.config.loss import LossConfig
from megatron_jam.tokenizers.vocabulary import JointVocabulary

KINDS = ("text", "image", "special", "infill")
"""Kinds of predicted tokens: JointVocabulary.modality's in their order, then text and image codes
of spans that CM3 moved, which are predicted with both sides in sight."""

INFILL = KINDS.index("infill")
SPECIAL = KINDS.index("special")


class Kinds:
    """Finds the kind of each token that is predicted."""

    def __init__(self, vocabulary: JointVocabulary) -> None:
        """Know the ids of `vocabulary`."""
        self._modality = torch.tensor(vocabulary.modality, dtype=torch.int64)
        self._eoss = vocabulary.eoss
        self._sentinels = vocabulary.sentinels

    def __call__(self, labels: Tensor) -> Tensor:
        """Number in KINDS of each label, int64 [B, S] -> [B, S]; on the CPU.

        What CM3 moved stands between a sentinel and an <eoss>, and nothing else does: the sentinel
        in a span's old place is followed by another one.
        """
        kinds = self._modality[labels]
        is_end = labels == self._eoss
        if is_end.any():
            length = labels.shape[1]
            first, last = self._sentinels.start, self._sentinels.stop
            marks = is_end | ((labels >= first) & (labels < last))
            places = torch.arange(length).where(marks, length)
            following = places.flip(1).cummin(1).values.flip(1)
            closes = torch.nn.functional.pad(is_end, (0, 1)).gather(1, following)
            kinds = torch.where(closes & (kinds != SPECIAL), INFILL, kinds)
        return kinds


def weights_of_kinds(config: LossConfig) -> Tensor:
    """What a token of each of KINDS counts in the training loss, float32 [4]."""
    return torch.tensor([getattr(config, kind) for kind in KINDS])


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Sums over the counted tokens of a global batch, unweighted, by the set that a sample is of
    and the kind of the predicted token."""

    sums: Tensor
    """Negative log-likelihood in nats, float64 [sets, kinds]."""

    counts: Tensor
    """Counted tokens, float64 [sets, kinds]."""

    @classmethod
    def total(cls, several: Sequence["Losses"]) -> "Losses":
        """Those of several batches together."""
        return cls(sums=sum(e.sums for e in several), counts=sum(e.counts for e in several))

    @property
    def mean(self) -> float:
        """Nats a token over everything counted."""
        return float(self.sums.sum()) / self.num_tokens

    @property
    def num_tokens(self) -> float:
        """Counted tokens, at least 1: what sums are divided by."""
        return max(1.0, float(self.counts.sum()))

    def by_modality(self) -> dict[str, float]:
        """Nats a token of each kind that occurs."""
        return _means(KINDS, self.sums.sum(0), self.counts.sum(0))

    def by_set(self, names: Sequence[str]) -> dict[str, float]:
        """Nats a token of each set that occurs; `names` of the sets by their numbers."""
        return _means(names, self.sums.sum(1), self.counts.sum(1))

    def tokens(self) -> dict[str, int]:
        """Counted tokens of each kind that occurs."""
        counts = zip(KINDS, self.counts.sum(0).tolist(), strict=True)
        return {name: int(count) for name, count in counts if count}


def mean_by_modality(losses: Mapping[str, Losses]) -> dict[str, float]:
    """Averages over named sets of their nats a token, "all" and each kind's over those that have
    it: each set counts alike, whatever its size."""
    found: dict[str, list[float]] = {"all": [each.mean for each in losses.values()]}
    for each in losses.values():
        for kind, value in each.by_modality().items():
            found.setdefault(kind, []).append(value)
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def _means(names: Sequence[str], sums: Tensor, counts: Tensor) -> dict[str, float]:
    triples = zip(names, sums.tolist(), counts.tolist(), strict=True)
    return {name: total / count for name, total, count in triples if count}
