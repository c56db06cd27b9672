"""What the loop asks of an engine, and Megatron's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megatron_jam.config.run import RunConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.twin import decoding_twin
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.optimizer import (
    PartNorms,
    build_optimizer,
    finish_weights,
    wrap_chunks,
)
from megatron_jam.training.state import sharded_state, take_state
from megatron_jam.training.step import Batch, ForwardBackward, Judge, StepResult, train_step
from megatron_jam.weights.load import whole_weights


class Decodable(NamedTuple):
    """A model that takes a token at a time, with a key-value cache."""

    chunks: Sequence[JamModel]
    """This rank's share, with torch's layers."""

    calls: Sequence[Callable[..., Tensor]]
    """What runs each chunk."""

    world: World
    """The ranks as these chunks see them."""


class Engine(Protocol):
    """Splits model, gradients and optimizer over the ranks; all of them call each method."""

    chunks: Sequence[JamModel]
    """This rank's share of the model."""

    forward: ForwardBackward
    """Runs global batches through it."""

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, judge: Judge
    ) -> StepResult:
        """Gradients of a global batch, then one optimizer step, unless `judge` is against."""
        ...

    def finish_weights(self) -> None:
        """Wait until the last step has reached the weights; before they are read."""
        ...

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer by global names, which are the same for every engine."""
        ...

    def take_state(self, loaded: Mapping[str, Any]) -> None:
        """Take what was loaded for `sharded_state`."""
        ...

    def whole_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each whole weight by canonical name, in the order of the table, on rank 0."""
        ...

    def for_decoding(self) -> Decodable:
        """The model as it is at any time, without copies, in a form that decodes."""
        ...


class MegatronEngine:
    """Megatron's data-parallel wrapper, schedules and distributed optimizer: every layout."""

    def __init__(
        self,
        chunks: Sequence[JamModel],
        config: RunConfig,
        world: World,
        vocabulary: JointVocabulary,
    ) -> None:
        """Wrap `chunks`, which have their weights and are frozen as they are to stay."""
        self.chunks, self._world = chunks, world
        self._wrapped = wrap_chunks(chunks, world)
        self.optimizer = build_optimizer(self._wrapped, config.optimizer)
        self._part_norms = PartNorms(chunks, self.optimizer, world)
        told = {"loss": config.loss, "num_sets": len(config.data.sets)}
        self.forward = ForwardBackward(self._wrapped, world, vocabulary, **told)

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, judge: Judge
    ) -> StepResult:
        """See Engine."""
        run = (self.forward, self.optimizer, micro_batches, learning_rate)
        return train_step(*run, self._part_norms, judge)

    def finish_weights(self) -> None:
        """See Engine."""
        finish_weights(self._wrapped)

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """See Engine."""
        return sharded_state(self.chunks, self.optimizer, self._world, is_loading=is_loading)

    def take_state(self, loaded: Mapping[str, Any]) -> None:
        """See Engine."""
        take_state(self.chunks, self.optimizer, loaded, self._world)

    def whole_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """See Engine."""
        return whole_weights(self.chunks, self._world)

    def for_decoding(self) -> Decodable:
        """See Engine."""
        twin, world = decoding_twin(self.chunks, self._world)
        return Decodable(twin, twin, world)
