"""The one training loop: parents, continued pretraining and instruction tuning."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import write_json, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.config.run import RunConfig
from megatron_jam.data.loader import GlobalBatches, build_dataset, image_tokenizer_of
from megatron_jam.data.mix import mix_of
from megatron_jam.parallel.device import DTYPES, peak_memory_bytes
from megatron_jam.parallel.seeds import seed_step
from megatron_jam.parallel.world import World
from megatron_jam.training.agreement import Agreement
from megatron_jam.training.best import BestCheckpoint
from megatron_jam.training.build import build_engine, check_run, identity
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import Checkpoints, Keep
from megatron_jam.training.export import HISTORY, MODEL, SETTINGS
from megatron_jam.training.health import LEFT_OUT, Health, Unhealthy
from megatron_jam.training.losses import Losses
from megatron_jam.training.memory_check import MemoryCheck
from megatron_jam.training.metrics import Reporter
from megatron_jam.training.preflight import check_replicas, log_start, save_environment
from megatron_jam.training.saver import Saver
from megatron_jam.training.skips import SKIPPED, report_skipped
from megatron_jam.training.step import ForwardBackward, StepResult
from megatron_jam.training.stop import StopPoll, StopRequested
from megatron_jam.training.watchdog import Watchdog
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
        self._watchdog = Watchdog(config.output, world, seconds=config.health.hang_seconds)
        self.health = Health(config.health)
        self._agreement = Agreement(self.health, self._stop_poll)
        self._done = self._measured = 0
        memory = MemoryCheck(world)
        try:
            with self._watchdog:
                self._build()
        except StopRequested as reason:
            self._stop_poll.leave(reason, 0)
            raise
        writes = world.rank == 0
        best = BestCheckpoint(self.config.output, writes=writes)
        # What others do after a validation comes first: a stop in its midst leaves the validation
        # to the next start, which reports it then.
        self._callbacks = [*callbacks, memory, Reporter(self.config, writes=writes), best]
        self._saver = Saver(
            self.checkpoints, self._callbacks, asynchronous=config.async_checkpoints
        )

    def _build(self) -> None:
        config, folder, world = self.config, self.folder, self.world
        check_run(config, folder, world)
        self._watchdog.progress(0, "building data and model")
        self._dataset = build_dataset(
            config.data,
            folder.vocabulary,
            context_length=config.context_length,
            seed=config.seed,
            index_cache=config.loader.index_cache,
            poll=self._stop_poll,
        )
        self.config = config = config.with_steps(self._dataset.epoch_size)
        self._epoch_ends = (
            config.epoch_ends(self._dataset.epoch_size) if config.keep_epochs else frozenset()
        )
        self._batches = GlobalBatches(
            self._dataset,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            data_parallel_rank=world.data.rank,
            data_parallel_size=world.data.size,
            isolate_documents=config.data.isolate_documents,
            workers=config.loader.workers,
        )
        self._stop_poll()
        self.engine = build_engine(config, folder, world)
        self.chunks = self.engine.chunks
        self.checkpoints = Checkpoints(
            config.output / "checkpoints",
            self.engine,
            world,
            identity=identity(config, folder),
            keep=Keep(
                newest=config.keep_checkpoints, every=config.keep_every, steps=self._epoch_ends
            ),
            describe=self._describe,
        )
        self._stop_poll()

    def _describe(self, part: Path) -> None:
        """Write what a checkpoint is of: the resolved settings, the model, its vocabulary."""
        self.config.save(part / SETTINGS)
        self.folder.copy_description(part / MODEL)
        write_json(part / MODEL / HISTORY, self._history())

    def _history(self) -> dict[str, Any]:
        """Where the run's weights come from, for the provenance of a weights folder."""
        return {
            "made_by": "megatron_jam.train",
            "parent": str(self.config.weights),
            "image_tokenizer_sha256": image_tokenizer_of(self.config.data)
            or self.folder.image_tokenizer_sha256,
        }

    def run(self) -> None:
        """Train to the end, or to `stop_at`; the end exports OUTPUT/weights.

        Raises:
            StopRequested: on all ranks, when the state has been saved and is to be resumed.
            Unhealthy: on all ranks; the state before what was wrong has been saved.
            SaveFailed: on all ranks, if that or the last state could not be saved.
        """
        with self._watchdog:
            self._run()

    def _run(self) -> None:
        first = self._prepare()
        try:
            self._train(first)
        except StopRequested as reason:
            logger.info("asked to stop by %s after step %d", reason, self._done)
            self._save(wait=True)
            self._stop_poll.leave(reason, self._done)
            raise
        except Unhealthy as reason:
            before = self._done - self.health.skipped_in_a_row
            logger.info("stopping: %s | saving the state after step %d", reason, before)
            self._saver.save(before, self._counters(self.health.state_before()), wait=True)
            raise
        finally:
            for each in self._callbacks:
                each.ends(self._done)

    def _prepare(self) -> int:
        """What stands before the first step; returns how many were made before."""
        config = self.config
        log_start(self.chunks, self.world, backend=config.backend, engine=config.engine)
        self._watchdog.progress(0, "checking and loading the newest checkpoint")
        resumed = self.checkpoints.load_latest(on_damage=config.on_damage)
        first = resumed.step
        if first > config.steps:
            raise UsageError(f"steps is {config.steps}, but the run has made {first} already")
        if self.world.rank == 0:
            config.output.mkdir(parents=True, exist_ok=True)
            config.save(config.output / "run.yaml")
            save_environment(
                config.output / "environment.json",
                self.world,
                backend=config.backend,
                engine=config.engine,
            )
        self._log_data()
        check_replicas(self.chunks, self.world)
        self.health.restore(resumed.counters.get("health", {}))
        self._done = self._saver.newest = first
        self._measured = resumed.counters.get("measured", 0)
        for each in self._callbacks:
            each.begins(self, first)
        return first

    def _log_data(self) -> None:
        """Say how long the run is and what it reads; OUTPUT/data.json has the same."""
        config, blend = self.config, self._dataset
        mix = mix_of(config.data, blend, config.steps * config.global_batch_size)
        logger.info("length: %s", config.length_as_text(blend.epoch_size))
        for line in mix.lines():
            logger.info("%s", line)
        if self.world.rank == 0:
            write_text_atomically(config.output / "data.json", json.dumps(mix.as_dict(), indent=2))

    def _train(self, first: int) -> None:
        config = self.config
        last = min(config.stop_at or config.steps, config.steps)
        self._stop_poll()
        self._after_step()
        for step in range(first, last):
            self._advance(step)
        self._save(wait=True)
        self._log_dropped(last - first)
        if last == config.steps:
            self._finish()
        self._stop_poll.ends()

    def _advance(self, step: int) -> None:
        """Step `step`, from 0, with all that belongs to it."""
        result = self._make_step(step)
        self._done = step + 1
        self.health.count(result.skipped)
        for each in self._callbacks:
            each.step_made(self._done, result)
        self._saver.poll()
        if self.health.is_hopeless:
            raise Unhealthy(
                f"{self.health.skipped_in_a_row} steps in a row were skipped,"
                f" the last as {result.skipped}"
            )
        self._stop_poll.check()
        self._after_step()

    def _after_step(self) -> None:
        """What is due now and then: comparison of copies, validation, saving.

        Also before the first step of a run that was stopped before it had measured.
        """
        config, done = self.config, self._done

        def is_due(every: int) -> bool:
            return bool(every and done and done % every == 0)

        if is_due(config.health.compare_replicas_every):
            self._watchdog.progress(done, "comparison of copies after the end")
            self.engine.finish_weights()
            check_replicas(self.chunks, self.world, done)
        ends_epoch = done in self._epoch_ends
        measure = is_due(config.validate_every) or ends_epoch
        if measure and done < config.steps and self._measured != done:
            self._measure()
        # A row of skipped steps may end the run, with the state before it.
        save = is_due(config.checkpoint_every) or ends_epoch
        if save and not self.health.skipped_in_a_row:
            self._save()
            self._stop_poll()  # what was asked meanwhile finds all saved

    def _make_step(self, step: int) -> StepResult:
        config = self.config
        rate = config.optimizer.rate(step, config.steps)
        if self.health.leaves_out(step + 1):
            logger.info("step %d is left out, as health.skip_steps says", step + 1)
            self._stop_poll.ask()
            return self.engine.forward.left_out(rate, LEFT_OUT)
        if config.dropout:
            seed_step(self.world, seed=config.seed, step=step)
        start = time.perf_counter()
        self._watchdog.progress(step + 1, "reading the batch")
        batches = self._batches(step)
        seconds = time.perf_counter() - start
        self._watchdog.progress(step + 1, "forward pass, backward pass and update")
        result = self.engine.train_step(batches, rate, self._agreement).after(data=seconds)
        if result.skipped:
            report_skipped(
                config.output / SKIPPED,
                step + 1,
                result.skipped,
                self._batches.indices(step),
                self.engine.forward.spoilt(),
                blend=self._dataset,
                names=[each.name for each in config.data.sets],
                world=self.world,
            )
        return result

    def _counters(self, health: Mapping[str, Any]) -> dict[str, Any]:
        return {"health": health, "measured": self._measured}

    def _save(self, *, wait: bool = False) -> None:
        self._watchdog.progress(self._done, "saving after the end")
        self.engine.finish_weights()
        self._saver.save(self._done, self._counters(self.health.state()), wait=wait)

    def _measure(self) -> None:
        self.engine.finish_weights()
        measured = self._validate(self.engine.forward, partial(self.poll, "validation"))
        for each in self._callbacks:
            each.validated(self._done, measured)
        self._measured = self._done

    def poll(self, what: str) -> None:
        """In what takes long between two steps, now and then: it makes progress, and may have to
        stop. All ranks take part.

        Raises:
            StopRequested: on all of them.
        """
        self._watchdog.progress(self._done, f"{what} after the end")
        self._stop_poll()

    def _log_dropped(self, num_steps: int) -> None:
        """Say what CM3's sentinels took the room of, on this replica in this start's steps."""
        config, dropped = self.config, self._batches.num_dropped
        samples = num_steps * config.global_batch_size // self.world.data.size
        if dropped:
            share = dropped / (samples * config.context_length)
            logger.info("%d tokens (%.2f%%) made room for sentinels", dropped, 100 * share)

    def _finish(self) -> None:
        self._measure()
        # A request to stop comes too late from here on: what is left takes less than a new start.
        self._watchdog.progress(self._done, "export after the end")
        config = self.config
        weights = config.output / "weights"
        provenance = {
            **self._history(),
            "steps": config.steps,
            "tokens": config.steps * config.global_batch_size * config.context_length,
        }
        export_weights(
            self.engine.whole_weights(),
            self.folder.config,
            self.world,
            weights,
            source=self.folder.path,
            dtype=DTYPES[config.precision],
            provenance=provenance,
        )
        peak = torch.tensor([float(peak_memory_bytes(self.world.device))], device=self.world.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        logger.info("wrote %s | peak memory of a rank %.2f GB", weights, peak.item() / 1e9)
