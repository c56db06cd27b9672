"""What a run reports: log lines for people, JSON lines for programs, TensorBoard and the like."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.config.run import RunConfig
from megatron_jam.parallel.device import device_name, peak_memory_bytes
from megatron_jam.planning.devices import Speed, peak_flops, speed
from megatron_jam.planning.flops import Flops, model_flops
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.losses import Losses, mean_by_modality
from megatron_jam.training.sinks import ProgressLine, Sink, open_sinks
from megatron_jam.training.step import StepResult

if TYPE_CHECKING:
    from megatron_jam.training.loop import Training

METRICS = "metrics.jsonl"
AVERAGE = "average"
"""Name under which the mean over all validation sets stands beside them."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a killed run left unfinished is dropped."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step computes, and on what."""

    causal: Flops
    full: Flops
    ranks: int
    peak: float | None
    """Dense peak of a device in FLOP/s, if it is known."""

    @classmethod
    def of(cls, training: "Training") -> "Work":
        """That of a run on its ranks' device."""
        config, world = training.config, training.world
        model = training.folder.config
        counted: dict[str, Any] = {
            "context_length": config.context_length,
            "frozen": config.freeze,
        }
        name = device_name(world.device)
        return cls(
            causal=model_flops(model, **counted),
            full=model_flops(model, attention="full", **counted),
            ranks=world.size,
            peak=peak_flops(name, precision=config.precision, fp8=config.fp8),
        )

    def speed(self, tokens_per_second: float) -> Speed:
        """What `tokens_per_second` of all ranks together amounts to."""
        return speed(
            tokens_per_second,
            causal=self.causal,
            full=self.full,
            ranks=self.ranks,
            peak=self.peak,
        )


class Window:
    """Times of the steps since the last report."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew; what a validation or a save took is of no window."""
        self._start, self._steps = time.perf_counter(), 0
        self._parts: defaultdict[str, float] = defaultdict(float)

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self._steps += 1
        for name, value in result.seconds.items():
            self._parts[name] += value

    def means(self) -> tuple[float, dict[str, float]]:
        """Seconds a step, and of its parts on this rank with `other` for what is left."""
        elapsed = time.perf_counter() - self._start
        steps = max(1, self._steps)
        other = max(0.0, elapsed - sum(self._parts.values()))
        parts = {**self._parts, "other": other}
        return elapsed / steps, {name: value / steps for name, value in parts.items()}


class Reporter(Callback):
    """Logs training steps and validations; rank 0 also writes OUTPUT/metrics.jsonl and, for
    TensorBoard, OUTPUT/tensorboard."""

    def __init__(self, config: RunConfig, *, writes: bool) -> None:
        self._config, self._writes = config, writes
        self._tokens = config.global_batch_size * config.context_length
        self._window = Window()
        self._sinks: list[Sink] = []
        self._progress: ProgressLine | None = None

    def begins(self, training: "Training", first: int) -> None:
        """Drop what an interrupted run wrote after step `first`, and start the clock."""
        warn_of_warmup(training.config)
        self._device = training.world.device
        self._work = Work.of(training)
        path = self._config.output / METRICS
        if self._writes:
            if path.exists():
                kept = [line for line in read_metrics(path) if line["step"] <= first]
                text = "".join(json.dumps(line) + "\n" for line in kept)
                write_text_atomically(path, text)
            self._sinks = open_sinks(self._config, path, first)
            self._progress = ProgressLine.on_terminal(self._config.steps)
        self._window.restart()

    def step_made(self, step: int, result: StepResult) -> None:
        """Report every `log_every`-th step, the first and the last, with the mean speed since."""
        self._window.add(result)
        if self._progress is not None:
            self._progress.show(step, result.losses.mean)
        if step % self._config.log_every == 0 or step in (1, self._config.steps):
            self._train(step, result)
            self._window.restart()

    def validated(self, step: int, measured: Mapping[str, Losses]) -> None:
        """Report perplexities of each validation set, and of their average."""
        for name, losses in measured.items():
            self._validation(step, name, losses.mean, losses.by_modality(), losses.tokens())
        if len(measured) > 1:
            means = mean_by_modality(measured)
            self._validation(step, AVERAGE, means.pop("all"), means, {})
        self._window.restart()

    def saved(self, step: int, path: Path) -> None:
        """Leave the save out of the steps' times."""
        self._window.restart()

    def ends(self, step: int) -> None:
        """Finish what is written."""
        if self._progress is not None:
            self._progress.close()
        for sink in self._sinks:
            sink.close()

    def _train(self, step: int, result: StepResult) -> None:
        peak = torch.tensor(float(peak_memory_bytes(self._device)), device=self._device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if not self._writes:
            return
        seconds, parts = self._window.means()
        reached = self._work.speed(self._tokens / seconds)
        names = [each.name for each in self._config.data.sets]
        losses = result.losses
        is_computed = bool(losses.tokens())
        values = {
            "loss": _finite(losses.mean) if is_computed else None,
            "loss_by_modality": _all_finite(losses.by_modality()),
            "loss_by_set": _all_finite(losses.by_set(names)),
            "tokens_by_modality": losses.tokens(),
            "skipped": result.skipped or None,
            "learning_rate": result.learning_rate,
            "grad_norm": _finite(result.grad_norm) if is_computed else None,
            "grad_norm_by_part": _all_finite(result.part_norms),
            "seconds_per_step": seconds,
            "seconds": parts,
            "tokens": step * self._tokens,
            "tokens_per_second": self._tokens / seconds,
            "tokens_per_second_per_rank": self._tokens / seconds / self._work.ranks,
            "tflops": reached.tflops,
            "tflops_full": reached.tflops_full,
            "mfu": reached.mfu,
            "peak_memory_bytes": int(peak),
            "seconds_left": seconds * (self._config.steps - step),
        }
        logger.info("%s", describe_step(step, self._config.steps, values))
        self._tell(step, "train", values)

    def _validation(
        self,
        step: int,
        name: str,
        loss: float,
        by_modality: Mapping[str, float],
        tokens: Mapping[str, int],
    ) -> None:
        finite = _all_finite({"all": loss, **by_modality})
        perplexity = {kind: perplexity_of(value) for kind, value in finite.items()}
        values = {
            "set": name,
            "loss": finite.pop("all", None),
            "loss_by_modality": finite,
            "perplexity": perplexity,
            "tokens_by_modality": dict(tokens),
        }
        shown = ", ".join(f"{key} {value:.2f}" for key, value in perplexity.items())
        mean = stated(values["loss"], ".4f")
        logger.info("step %d | validation %s | loss %s | perplexity %s", step, name, mean, shown)
        self._tell(step, "validation", values)

    def _tell(self, step: int, kind: str, values: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, kind, values)


def warn_of_warmup(config: RunConfig) -> None:
    """Say so if the learning rate never reaches its peak, and what to set."""
    warmup, steps = config.optimizer.warmup_steps, config.steps
    if warmup >= steps:
        logger.warning(
            "optimizer.warmup_steps is %d and the run has %d steps: the learning rate only rises,"
            " to %.2e of %.2e; set optimizer.warmup_steps to %d, or train longer",
            warmup,
            steps,
            config.optimizer.rate(steps - 1, steps),
            config.optimizer.learning_rate,
            max(1, steps // 10),
        )


def describe_step(step: int, steps: int, values: Mapping[str, Any]) -> str:
    """A log line of a training step's `values`, as metrics.jsonl has them."""
    kinds = _pairs(values["loss_by_modality"], ".3f")
    sets = values["loss_by_set"]
    norms = _pairs(values["grad_norm_by_part"], ".2f")
    times = _pairs({k: 1e3 * v for k, v in values["seconds"].items()}, ".0f")
    parts = [
        f"step {step}/{steps}" + (f", skipped: {values['skipped']}" if values["skipped"] else ""),
        f"loss {stated(values['loss'], '.4f')} ({kinds})",
        *([_pairs(sets, ".3f")] if len(sets) > 1 else []),
        f"lr {values['learning_rate']:.2e}",
        f"grad {stated(values['grad_norm'], '.2f')} ({norms})",
        f"{1e3 * values['seconds_per_step']:.0f} ms ({times})",
        f"{values['tokens_per_second']:,.0f} tokens/s,"
        f" {values['tokens_per_second_per_rank']:,.0f} a rank",
        f"{values['tflops']:.3g} TFLOP/s a rank ({values['tflops_full']:.3g} full),"
        f" MFU {stated(values['mfu'], '.1%')}",
        f"memory {values['peak_memory_bytes'] / 1e9:.2f} GB",
        f"left {duration(values['seconds_left'])}",
    ]
    return " | ".join(parts)


def perplexity_of(nats: float) -> float:
    """exp(nats), finite."""
    return math.exp(min(nats, 700.0))


def stated(value: float | None, form: str) -> str:
    """A figure in a format, or that there is none."""
    return "n/a" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _pairs(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value:{form}}" for name, value in values.items())


def _finite(value: float) -> float | None:
    """What JSON has a number for."""
    return value if math.isfinite(value) else None


def _all_finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
