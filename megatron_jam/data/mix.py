"""What a run reads of each set and of each modality: asked for by weights, and got."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_jam.config.data import DataConfig
from megatron_jam.data.blend import Blend
from megatron_jam.data.indexed import read_info


@dataclass(frozen=True, kw_only=True)
class SetShare:
    """One set's part of a run."""

    name: str
    """Of the set."""

    asked: float
    """Share of the samples by weight."""

    got: float
    """Share of the samples that the run reads."""

    samples: int
    """How many those are."""

    epochs: float
    """How often the set is read."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A run's data."""

    sets: list[SetShare]
    """In the order of the blend."""

    asked: Mapping[str, float]
    """Share of the tokens of text, image and special, by weight."""

    got: Mapping[str, float]
    """Share of the tokens that the run reads; before CM3, and without padding."""

    def lines(self) -> list[str]:
        """For people, one line a set and one a modality."""
        sets = [
            f"data {each.name}: {each.got:.2%} of the samples ({each.asked:.2%} asked), "
            f"{each.samples} samples, {each.epochs:.3g} epochs"
            for each in self.sets
        ]
        return sets + [
            f"tokens {name}: {share:.2%} ({self.asked[name]:.2%} asked)"
            for name, share in self.got.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def mix_of(config: DataConfig, blend: Blend, num_samples: int) -> Mix:
    """What the first `num_samples` samples of the blend that `config` describes are made of."""
    total = sum(each.weight for each in config.sets)
    shares, asked_tokens, got_tokens = [], {}, {}
    columns = blend.epoch_sizes, blend.epoch_tokens, blend.counts(num_samples)
    for each, size, tokens, count in zip(config.sets, *columns, strict=True):
        asked = each.weight / total
        shares.append(
            SetShare(
                name=each.name,
                asked=asked,
                got=count / max(1, num_samples),
                samples=count,
                epochs=count / size,
            )
        )
        for name, share in _shares(read_info(each.path).tokens_by_modality).items():
            due = asked * num_samples / size * tokens * share
            asked_tokens[name] = asked_tokens.get(name, 0.0) + due
            got_tokens[name] = got_tokens.get(name, 0.0) + count / size * tokens * share
    return Mix(sets=shares, asked=_shares(asked_tokens), got=_shares(got_tokens))


def _shares(tokens: Mapping[str, float]) -> dict[str, float]:
    total = sum(tokens.values()) or 1.0
    return {name: value / total for name, value in tokens.items()}
