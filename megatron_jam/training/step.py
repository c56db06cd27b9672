"""One optimizer step: micro-batches through Megatron's pipeline schedule, and what it reports."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_jam.config.loss import LossConfig
from megatron_jam.parallel.context import context_share
from megatron_jam.parallel.device import synchronize
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.losses import KINDS, Kinds, Losses, weights_of_kinds
from megatron_jam.training.optimizer import PartNorms, set_learning_rate, update

Batch = Mapping[str, Tensor]


class Judge(Protocol):
    """Says whether a step is to be skipped; all ranks hear the same, but for the words."""

    def message(self, loss: float) -> Tensor:
        """What this rank tells the others when it knows the mean loss, float64 [n]."""
        ...

    def __call__(self, loss: float, grad_norm: float, messages: Tensor) -> str:
        """Why the step is to be skipped, or nothing; `messages` are summed over all ranks."""
        ...


class MustBeFinite:
    """A judge that skips nothing."""

    def message(self, loss: float) -> Tensor:
        """Nothing: loss and norm are the same on all ranks."""
        return torch.empty(0, dtype=torch.float64)

    def __call__(self, loss: float, grad_norm: float, messages: Tensor) -> str:
        """Raise FloatingPointError unless both are finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"the loss is {loss}, the gradient's norm {grad_norm}")
        return ""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step was, the same on every rank but for the seconds."""

    losses: Losses
    """Before the update."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""

    part_norms: Mapping[str, float]
    """Of its parts: each tower, bridges, embeddings, head."""

    learning_rate: float
    seconds: Mapping[str, float]
    """Time of this rank's parts of the step: data, forward_backward, reduction (of gradients over
    replicas and stages), optimizer (with the sending of updated weights)."""

    skipped: str = ""
    """Why no weight was changed, or nothing."""

    def after(self, **seconds: float) -> "StepResult":
        """The same with the times of parts that came before it."""
        return replace(self, seconds={**seconds, **self.seconds})


class ForwardBackward:
    """Runs global batches through the model's chunks on this rank."""

    def __init__(
        self,
        chunks: Sequence[MegatronModule],
        world: World,
        vocabulary: JointVocabulary,
        *,
        loss: LossConfig = LossConfig(),
        num_sets: int = 1,
    ) -> None:
        """Run `chunks`: wrapped for training, or plain for `forward_only`.

        Args:
            chunks: this rank's model.
            world: the ranks.
            vocabulary: tells the kinds of tokens.
            loss: what each kind counts in the gradients.
            num_sets: data sets whose losses are told apart, by a batch's `sets`.
        """
        self._chunks = list(chunks)
        self._world, self.device = world, world.device
        self._kinds, self._num_sets = Kinds(vocabulary), num_sets
        self._weights = weights_of_kinds(loss)
        self._schedule = get_forward_backward_func()
        self.reduction_seconds = 0.0
        """How long the last call's sums of gradients over replicas and stages took, where they do
        not overlap the backward pass."""
        settings = self._chunks[0].config
        if settings.finalize_model_grads_func is not None:
            self._reduce = settings.finalize_model_grads_func
            settings.finalize_model_grads_func = self._timed_reduce
        self._reported: list[dict[str, Tensor]] = []

    def __call__(self, micro_batches: Sequence[Batch], *, forward_only: bool = False) -> Losses:
        """Compute losses and, unless `forward_only`, gradients of the sum over counted tokens.

        Args:
            micro_batches: this replica's share; tokens, labels, positions int64 [B, S],
                loss_mask float32 [B, S]; documents int64 [B, S] if each is read by itself; sets
                int64 [B], each sample's data set, by default 0.
            forward_only: leave the gradients alone.

        Returns:
            The losses of the global batch, the same on every rank.
        """
        chunks = self._chunks
        for chunk in chunks:
            chunk.train(not forward_only)
            if not forward_only:
                chunk.zero_grad_buffer()
        size, length = micro_batches[0]["tokens"].shape
        iterators = [iter(micro_batches) for _ in chunks]
        reported = self._schedule(
            forward_step_func=self._forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        self._reported = reported
        return self._collect(reported)

    def _timed_reduce(self, *args: object, **kwargs: object) -> None:
        synchronize(self._world.device)
        start = time.perf_counter()
        self._reduce(*args, **kwargs)
        synchronize(self._world.device)
        self.reduction_seconds = time.perf_counter() - start

    def left_out(self, learning_rate: float, reason: str) -> StepResult:
        """The result of a step whose batch was not even computed."""
        none = torch.zeros(self._num_sets, len(KINDS), dtype=torch.float64)
        return StepResult(
            losses=Losses(sums=none, counts=none),
            grad_norm=0.0,
            part_norms={},
            learning_rate=learning_rate,
            seconds={},
            skipped=reason,
        )

    def spoilt(self) -> list[int]:
        """Which of this rank's last micro-batches have a loss that is not finite."""
        return [n for n, each in enumerate(self._reported) if not each["report"].isfinite().all()]

    def _forward(self, batches: Iterator[Batch], chunk: MegatronModule) -> tuple[Tensor, object]:
        batch = self._share(next(batches))
        documents = batch.get("documents")
        names = ("tokens", "positions", "labels", "weights")
        output = chunk(*(batch[name] for name in names), documents)
        return output, partial(self._loss, batch)

    def _share(self, batch: Batch) -> dict[str, Tensor]:
        """This rank's part of a batch, with each label's weight and its cell of the report."""
        batch = dict(batch)
        kinds = self._kinds(batch["labels"])
        sets = batch.pop("sets", torch.zeros(len(kinds), dtype=torch.int64))
        batch["weights"] = batch["loss_mask"] * self._weights[kinds]
        batch["cells"] = sets[:, None] * len(KINDS) + kinds
        context, device = self._world.context, self._world.device
        return {
            name: context_share(value, context.rank, context.size).to(device)
            for name, value in batch.items()
        }

    def _loss(
        self, batch: Batch, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weighted sum of the counted losses, their number, and both unweighted by set and kind."""
        total, losses = output
        mask = batch["loss_mask"]
        cells = batch["cells"].reshape(-1)
        shape = (2, self._num_sets * len(KINDS))
        report = torch.zeros(shape, dtype=torch.float64, device=losses.device)
        report[0].index_add_(0, cells, (losses * mask).double().reshape(-1))
        report[1].index_add_(0, cells, mask.double().reshape(-1))
        return total, mask.sum().to(torch.int), {"report": report}

    def _collect(self, reported: list[dict[str, Tensor]]) -> Losses:
        world = self._world
        shape = (2, self._num_sets * len(KINDS))
        total = torch.zeros(shape, dtype=torch.float64, device=world.device)
        for entry in reported:
            total += entry["report"]
        if world.pipeline.is_last:
            dist.all_reduce(total, group=world.replicas.group)
        world.broadcast_from_last_stage(total)
        sums, counts = total.cpu().unflatten(1, (self._num_sets, len(KINDS)))
        return Losses(sums=sums, counts=counts)


def train_step(
    step: ForwardBackward,
    optimizer: MegatronOptimizer,
    micro_batches: Sequence[Batch],
    learning_rate: float,
    part_norms: PartNorms | None = None,
    judge: Judge | None = None,
) -> StepResult:
    """Gradients of a global batch, then one optimizer step, unless `judge` is against; `part_norms`
    measures the gradient in place of Megatron, and carries the judge's messages.

    Raises:
        FloatingPointError: without a judge, on every rank, before any weight has changed.
    """
    assert judge is None or part_norms is not None, "its messages would not be carried"
    judge = judge or MustBeFinite()
    start = time.perf_counter()
    # A gradient left over from the last step would be counted a second time by Megatron's hooks.
    optimizer.zero_grad()
    losses = step(micro_batches)
    computed = time.perf_counter()
    optimizer.prepare_grads()
    num_tokens = losses.num_tokens
    messages = judge.message(losses.mean)
    parts = part_norms(messages) if part_norms is not None else {}
    parts = {name: each / num_tokens for name, each in parts.items()}
    norm = math.hypot(*parts.values()) if parts else float(optimizer.get_grad_norm()) / num_tokens
    skipped = judge(losses.mean, norm, messages)
    if not skipped:
        set_learning_rate(optimizer, learning_rate)
        update(optimizer, norm, num_tokens)
    synchronize(step.device)
    seconds = {
        "forward_backward": computed - start - step.reduction_seconds,
        "reduction": step.reduction_seconds,
        "optimizer": time.perf_counter() - computed,
    }
    return StepResult(
        losses=losses,
        grad_norm=norm,
        part_norms=parts,
        learning_rate=learning_rate,
        seconds=seconds,
        skipped=skipped,
    )
