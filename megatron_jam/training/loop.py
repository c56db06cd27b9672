"""The one training loop: parents, continued pretraining and instruction tuning."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.config.run import RunConfig
from megatron_jam.data.indexed import read_info
from megatron_jam.data.loader import (
    build_dataset,
    collate,
    global_batch_indices,
    image_tokenizer_of,
)
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import learns, parameter_table
from megatron_jam.models.sharding import freeze
from megatron_jam.parallel.device import DTYPES, peak_memory_bytes
from megatron_jam.parallel.seeds import seed_step
from megatron_jam.parallel.world import World
from megatron_jam.training.checkpoint import Checkpoints
from megatron_jam.training.metrics import Reporter
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.preflight import check_replicas, log_start, save_environment
from megatron_jam.training.step import Batch, ForwardBackward, Losses, train_step
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import export_weights, load_weights

Validate = Callable[[ForwardBackward], Mapping[str, Losses]]
"""Measures the validation sets with the live model; given by the entry point."""


class Training:
    """A phase that begins from a weights folder or resumes its own run."""

    def __init__(
        self, config: RunConfig, folder: WeightsFolder, world: World, validate: Validate
    ) -> None:
        """Build model, optimizer and data.

        Args:
            config: the run.
            folder: its weights, opened.
            world: the ranks.
            validate: measures the validation sets.

        Raises:
            UsageError: if settings, weights, vocabulary and data do not fit each other.
        """
        self.config, self.world = config, world
        self._validate = validate
        self.folder = folder
        self._check()
        self._dataset = build_dataset(
            config.data,
            folder.vocabulary,
            context_length=config.context_length,
            seed=config.seed,
        )
        self.chunks = [
            JamModel(
                folder.config,
                world,
                dtype=DTYPES[config.precision],
                recompute=config.recompute,
                dropout=config.dropout,
                backend=config.backend,
                fp8=config.fp8,
                chunk=chunk,
            )
            for chunk in range(config.parallel.interleave)
        ]
        load_weights(self.chunks, folder, world)
        for chunk in self.chunks:
            freeze(chunk, config.freeze)
        wrapped = wrap_chunks(self.chunks, world)
        self._optimizer = build_optimizer(wrapped, config.optimizer)
        self._step = ForwardBackward(wrapped, world, folder.vocabulary)
        self._checkpoints = Checkpoints(
            config.output / "checkpoints",
            self.chunks,
            self._optimizer,
            world,
            identity=identity(config, folder),
            keep=config.keep_checkpoints,
        )
        self._reporter = Reporter(
            config.output,
            steps=config.steps,
            tokens_per_step=config.global_batch_size * config.context_length,
            writes=world.rank == 0,
        )

    def run(self) -> None:
        """Train to the end, or to `stop_at`; the end exports OUTPUT/weights."""
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
        self._reporter.start(first)
        last = min(config.stop_at or config.steps, config.steps)
        for step in range(first, last):
            self._train(step)
            done = step + 1
            if config.validate_every and done % config.validate_every == 0 and done < last:
                self._report_validation(done)
            if config.checkpoint_every and done % config.checkpoint_every == 0 and done < last:
                self._checkpoints.save(done)
        if first < last:
            self._checkpoints.save(last)
        if last == config.steps:
            self._finish()

    def _train(self, step: int) -> None:
        config = self.config
        rate = config.optimizer.rate(step, config.steps)
        if config.dropout:
            seed_step(self.world, seed=config.seed, step=step)
        losses, norm = train_step(self._step, self._optimizer, self._batches(step), rate)
        self._reporter.step_done()
        done = step + 1
        if done % config.log_every == 0 or done in (1, config.steps):
            self._reporter.train(done, losses, learning_rate=rate, grad_norm=norm)

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
            for each in indices
        ]

    def _report_validation(self, step: int) -> None:
        for name, losses in self._validate(self._step).items():
            self._reporter.validation(step, name, losses)

    def _finish(self) -> None:
        self._report_validation(self.config.steps)
        weights: Path = self.config.output / "weights"
        provenance = {
            "made_by": "megatron_jam.train",
            "parent": str(self.config.weights),
            "image_tokenizer_sha256": image_tokenizer_of(self.config.data)
            or self.folder.image_tokenizer_sha256,
            "steps": self.config.steps,
            "tokens": self.config.steps
            * self.config.global_batch_size
            * self.config.context_length,
        }
        export_weights(
            self.chunks,
            self.world,
            weights,
            source=self.folder.path,
            dtype=DTYPES[self.config.precision],
            provenance=provenance,
        )
        peak = torch.tensor([float(peak_memory_bytes(self.world.device))], device=self.world.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        logger.info("wrote %s | peak memory of a rank %.2f GB", weights, peak.item() / 1e9)

    def _check(self) -> None:
        """Raise UsageError unless settings, weights, tokenizers and data fit each other."""
        config, model = self.config, self.folder.config
        if config.context_length > model.max_positions:
            raise UsageError(
                f"context_length {config.context_length} is longer than the model's max_positions"
                f" {model.max_positions}"
            )
        if config.freeze and not model.is_pair:
            raise UsageError(f"freeze is {config.freeze}, but the model has one tower alone")
        if not any(learns(entry, config.freeze) for entry in parameter_table(model)):
            raise UsageError(f"freeze is {config.freeze}, which leaves nothing to train")
        config.parallel.check_micro_batches(config.num_micro_batches(self.world.size))
        for each in config.data.sets:
            self.folder.require_tokenizer(read_info(each.path).tokenizer_sha256, each.path)
        images, known = image_tokenizer_of(config.data), self.folder.image_tokenizer_sha256
        if images and known and images != known:
            raise UsageError(
                f"the pictures of data.sets were encoded with another image tokenizer than those"
                f" that {self.folder.path} was trained on; prepare them with that one"
            )


def identity(config: RunConfig, folder: WeightsFolder) -> dict[str, Any]:
    """What makes a run's step n the same step n: its data, their order, and where it began."""
    return {
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "context_length": config.context_length,
        "data": dataclasses.asdict(config.data),
        "vocabulary": folder.vocabulary.sha256,
        "weights": folder.sha256,
        "dropout": config.dropout,
        "freeze": sorted(config.freeze),
    }
