"""The one training loop: parents, continued pretraining and instruction tuning."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.config.run import RunConfig
from megatron_jam.data.loader import (
    build_dataset,
    collate,
    global_batch_indices,
    image_tokenizer_of,
)
from megatron_jam.parallel.device import DTYPES, peak_memory_bytes
from megatron_jam.parallel.seeds import seed_step
from megatron_jam.parallel.world import World
from megatron_jam.training.build import build_chunks, check_run, identity
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import Checkpoints
from megatron_jam.training.losses import Losses
from megatron_jam.training.metrics import Reporter
from megatron_jam.training.optimizer import (
    PartNorms,
    build_optimizer,
    finish_weights,
    wrap_chunks,
)
from megatron_jam.training.preflight import check_replicas, log_start, save_environment
from megatron_jam.training.step import Batch, ForwardBackward, StepResult, train_step
from megatron_jam.training.stop import StopPoll, StopRequested
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import export_weights

Validate = Callable[[ForwardBackward, Callable[[], None]], Mapping[str, Losses]]
"""Measures the validation sets with the live model, and now and then calls its second argument,
which raises where the run is to stop; given by the entry point."""


class Training:
    """A phase that begins from a weights folder or resumes its own run."""

    def __init__(
        self,
        config: RunConfig,
        folder: WeightsFolder,
        world: World,
        validate: Validate,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Build model, optimizer and data.

        Args:
            config: the run.
            folder: its weights, opened.
            world: the ranks.
            validate: measures the validation sets.
            callbacks: what is told of the run's course, besides its log.

        Raises:
            UsageError: if settings, weights, vocabulary and data do not fit each other.
            StopRequested: as `run`.
        """
        self.config, self.folder, self.world = config, folder, world
        self._validate = validate
        self._stop_poll = StopPoll(config.output, world)
        try:
            self._build()
        except StopRequested as reason:
            self._stop_poll.leave(reason, 0)
            raise
        self._callbacks = [Reporter(config, writes=world.rank == 0), *callbacks]

    def _build(self) -> None:
        config, folder, world = self.config, self.folder, self.world
        check_run(config, folder, world)
        self._dataset = build_dataset(
            config.data,
            folder.vocabulary,
            context_length=config.context_length,
            seed=config.seed,
        )
        self._stop_poll()
        self.chunks = build_chunks(config, folder, world)
        wrapped = wrap_chunks(self.chunks, world)
        self._wrapped = wrapped
        self._optimizer = build_optimizer(wrapped, config.optimizer)
        self._part_norms = PartNorms(self.chunks, self._optimizer, world)
        told = {"loss": config.loss, "num_sets": len(config.data.sets)}
        self._step = ForwardBackward(wrapped, world, folder.vocabulary, **told)
        self._checkpoints = Checkpoints(
            config.output / "checkpoints",
            self.chunks,
            self._optimizer,
            world,
            identity=identity(config, folder),
            keep=config.keep_checkpoints,
        )
        self._stop_poll()

    def run(self) -> None:
        """Train to the end, or to `stop_at`; the end exports OUTPUT/weights.

        Raises:
            StopRequested: on all ranks, when the state has been saved and is to be resumed.
        """
        first = self._prepare()
        self._done = self._saved = first
        try:
            self._train(first)
        except StopRequested as reason:
            logger.warning("asked to stop by %s after step %d", reason, self._done)
            self._save()
            self._stop_poll.leave(reason, self._done)
            raise
        finally:
            for each in self._callbacks:
                each.ends(self._done)

    def _prepare(self) -> int:
        """What stands before the first step; returns how many were made before."""
        config = self.config
        log_start(self.chunks, self.world, backend=config.backend)
        first = self._checkpoints.load_latest()
        if first > config.steps:
            raise UsageError(f"steps is {config.steps}, but the run has made {first} already")
        if self.world.rank == 0:
            config.output.mkdir(parents=True, exist_ok=True)
            config.save(config.output / "run.yaml")
            save_environment(config.output / "environment.json", self.world, backend=config.backend)
        check_replicas(self.chunks, self.world)
        for each in self._callbacks:
            each.begins(self, first)
        return first

    def _train(self, first: int) -> None:
        config = self.config
        last = min(config.stop_at or config.steps, config.steps)
        self._stop_poll()
        for step in range(first, last):
            result = self._make_step(step)
            self._done = done = step + 1
            for each in self._callbacks:
                each.step_made(done, result)
            self._stop_poll()
            if config.validate_every and done % config.validate_every == 0 and done < config.steps:
                self._measure()
            if config.checkpoint_every and done % config.checkpoint_every == 0:
                self._save()
        self._save()
        if last == config.steps:
            self._finish()

    def _make_step(self, step: int) -> StepResult:
        config = self.config
        rate = config.optimizer.rate(step, config.steps)
        if config.dropout:
            seed_step(self.world, seed=config.seed, step=step)
        start = time.perf_counter()
        batches = self._batches(step)
        seconds = time.perf_counter() - start
        made = train_step(self._step, self._optimizer, batches, rate, self._part_norms)
        return made.after(data=seconds)

    def _batches(self, step: int) -> list[Batch]:
        indices = global_batch_indices(
            step,
            global_batch_size=self.config.global_batch_size,
            micro_batch_size=self.config.micro_batch_size,
            data_parallel_rank=self.world.data.rank,
            data_parallel_size=self.world.data.size,
        )
        isolate = self.config.data.isolate_documents
        return [
            collate([self._dataset.sample(i) for i in each], isolate_documents=isolate)
            | {"sets": torch.tensor([self._dataset.locate(i)[0] for i in each])}
            for each in indices
        ]

    def _save(self) -> None:
        """Save what has been done, unless it is saved already."""
        if self._saved == self._done:
            return
        finish_weights(self._wrapped)
        path = self._checkpoints.save(self._done)
        self._saved = self._done
        for each in self._callbacks:
            each.saved(self._done, path)

    def _measure(self) -> None:
        finish_weights(self._wrapped)
        measured = self._validate(self._step, self._stop_poll)
        for each in self._callbacks:
            each.validated(self._done, measured)

    def _finish(self) -> None:
        self._measure()
        config = self.config
        weights = config.output / "weights"
        provenance = {
            "made_by": "megatron_jam.train",
            "parent": str(config.weights),
            "image_tokenizer_sha256": image_tokenizer_of(config.data)
            or self.folder.image_tokenizer_sha256,
            "steps": config.steps,
            "tokens": config.steps * config.global_batch_size * config.context_length,
        }
        export_weights(
            self.chunks,
            self.world,
            weights,
            source=self.folder.path,
            dtype=DTYPES[config.precision],
            provenance=provenance,
        )
        peak = torch.tensor([float(peak_memory_bytes(self.world.device))], device=self.world.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        logger.info("wrote %s | peak memory of a rank %.2f GB", weights, peak.item() / 1e9)
