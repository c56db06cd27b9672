"""What a run reports: log lines for people, JSON lines for programs."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.config.run import RunConfig
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.losses import Losses
from megatron_jam.training.step import StepResult

if TYPE_CHECKING:
    from megatron_jam.training.loop import Training

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a killed run left unfinished is dropped."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Reporter(Callback):
    """Logs training steps and validations; rank 0 also appends them to OUTPUT/metrics.jsonl."""

    def __init__(self, config: RunConfig, *, writes: bool) -> None:
        self._path = config.output / METRICS if writes else None
        self._steps, self._every = config.steps, config.log_every
        self._tokens = config.global_batch_size * config.context_length
        self._window_start, self._window_steps = time.perf_counter(), 0

    def begins(self, training: "Training", first: int) -> None:
        """Drop what an interrupted run wrote after step `first`, and start the clock."""
        if self._path is not None and self._path.exists():
            kept = [line for line in read_metrics(self._path) if line["step"] <= first]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text_atomically(self._path, text)
        self._window_start, self._window_steps = time.perf_counter(), 0

    def step_made(self, step: int, result: StepResult) -> None:
        """Report every `log_every`-th step, the first and the last, with the mean speed since."""
        self._window_steps += 1
        if step % self._every == 0 or step in (1, self._steps):
            self._train(step, result)

    def _train(self, step: int, result: StepResult) -> None:
        losses = result.losses
        elapsed = time.perf_counter() - self._window_start
        seconds = elapsed / max(1, self._window_steps)
        by_modality = losses.by_modality()
        logger.info(
            "step %d/%d | loss %.4f (%s) | lr %.2e | grad %.2f | %.0f ms | %.0f tokens/s | left %s",
            step,
            self._steps,
            losses.mean,
            ", ".join(f"{name} {value:.3f}" for name, value in by_modality.items()),
            result.learning_rate,
            result.grad_norm,
            seconds * 1e3,
            self._tokens / seconds,
            _duration(seconds * (self._steps - step)),
        )
        self._write(
            step,
            "train",
            {
                "loss": losses.mean,
                "loss_by_modality": by_modality,
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
                "seconds_per_step": seconds,
            },
        )
        self._window_start, self._window_steps = time.perf_counter(), 0

    def validated(self, step: int, measured: Mapping[str, Losses]) -> None:
        """Report perplexities of each validation set."""
        for name, losses in measured.items():
            self._validation(step, name, losses)

    def _validation(self, step: int, name: str, losses: Losses) -> None:
        perplexity = {k: _perplexity(v) for k, v in losses.by_modality().items()}
        logger.info(
            "step %d | validation %s | loss %.4f | perplexity %s",
            step,
            name,
            losses.mean,
            ", ".join(f"{key} {value:.2f}" for key, value in perplexity.items()),
        )
        values = {"set": name, "loss": losses.mean, "loss_by_modality": losses.by_modality()}
        self._write(step, "validation", values)
        self._window_start, self._window_steps = time.perf_counter(), 0

    def _write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
