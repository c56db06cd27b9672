"""Where a run's figures go besides its log: JSON lines, TensorBoard, W&B, a terminal."""

import importlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.config.run import RunConfig

TENSORBOARD = "tensorboard"


class Sink(Protocol):
    """Takes a run's figures, on rank 0 alone."""

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Take what was measured at `step`: `kind` is train or validation, values are numbers and
        maps of them."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_sinks(config: RunConfig, metrics: Path, first: int) -> list[Sink]:
    """JSON lines at `metrics` and TensorBoard, and W&B where `config.wandb` names a project.

    Args:
        config: the run.
        metrics: the file of JSON lines, appended to.
        first: steps made before; what TensorBoard has of later ones is hidden.

    Raises:
        UsageError: W&B is asked for and not installed.
    """
    sinks: list[Sink] = [JsonLines(metrics), TensorBoard(config.output / TENSORBOARD, first)]
    return [*sinks, WeightsAndBiases(config)] if config.wandb else sinks


class JsonLines:
    """One JSON object a line; everything else can be drawn from it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append a line; it is in the file when this returns."""
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Nothing is left to write."""
        self._file.close()


class TensorBoard:
    """Event files for `tensorboard --logdir`, written by a thread of tensorboard's own."""

    def __init__(self, folder: Path, first: int) -> None:
        # Imported here: it takes a quarter of a second, on rank 0 alone.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))
        if first:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=first + 1, wall_time=time.time(), session_log=start))

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Add all numbers as one event, each under its name, as train/loss_by_modality/text:
        torch's SummaryWriter makes an event of each, which takes thirty times as long."""
        pairs = [{"tag": tag, "simple_value": value} for tag, value in scalars(kind, values)]
        event = self._event(step=step, wall_time=time.time(), summary=self._summary(value=pairs))
        self._writer.add_event(event)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its own settings, such as WANDB_MODE=offline, hold."""

    def __init__(self, config: RunConfig) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise UsageError(
                f"wandb is {config.wandb!r}, but the package wandb is not installed: pip install"
                " wandb, or leave the setting out"
            ) from error
        # The same id for all starts of a run, so that a resumed one goes on in its own curves.
        name = str(config.output).strip("/").replace("/", "-")
        self._run = wandb.init(
            project=config.wandb,
            id=name,
            name=name,
            dir=str(config.output),
            config=config.as_dict(),
            resume="allow",
        )

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Log each number under its name, as TensorBoard has it."""
        self._run.log(dict(scalars(kind, values)), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def scalars(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number in `values` with a name of its own: kind, set of a validation, path of keys."""
    prefix = f"{kind}/{values['set']}" if "set" in values else kind
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{prefix}/{name}/{key}", float(each)) for key, each in value.items())
        elif isinstance(value, int | float):
            yield f"{prefix}/{name}", float(value)


class ProgressLine:
    """One line at the bottom of a terminal that says how far the run is; log lines go above it."""

    WIDTH = 24

    def __init__(self, stream: TextIO, steps: int) -> None:
        self._stream, self._steps = stream, steps
        self._first: tuple[int, float] | None = None
        self._handlers = [each for each in logger.handlers if _writes_to(each, stream)]
        for handler in self._handlers:
            handler.addFilter(self._make_room)

    @classmethod
    def on_terminal(cls, steps: int) -> "ProgressLine | None":
        """On standard error if it is a terminal; a batch log gets plain lines alone."""
        return cls(sys.stderr, steps) if sys.stderr.isatty() else None

    def show(self, step: int, loss: float) -> None:
        """Say that `step` was made."""
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
        made, seconds = step - self._first[0], now - self._first[1]
        left = f" | left {_clock(seconds / made * (self._steps - step))}" if made else ""
        full = self.WIDTH * step // self._steps
        bar = "#" * full + "." * (self.WIDTH - full)
        text = f"[{bar}] step {step}/{self._steps} | loss {loss:.4f}{left}"
        self._stream.write(f"\r{text}\x1b[K")
        self._stream.flush()

    def close(self) -> None:
        """Leave the terminal clean."""
        for handler in self._handlers:
            handler.removeFilter(self._make_room)
        self._clear()

    def _make_room(self, _: logging.LogRecord) -> bool:
        self._clear()
        return True

    def _clear(self) -> None:
        self._stream.write("\r\x1b[K")
        self._stream.flush()


def _writes_to(handler: logging.Handler, stream: TextIO) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream is stream


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
