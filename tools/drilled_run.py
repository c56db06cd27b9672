"""A training run under torchrun that is disturbed on purpose."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from megatron_jam.config.errors import UsageError

_PATIENCE = 1200.0
_RANK_WAIT = 60.0
_SMALL_DISK_BYTES = 192 << 20
_ROOT = Path(__file__).resolve().parents[1]

_FILL = r"""
mount -t tmpfs -o size={size} tmpfs {folder} || exit 99
( until ls -d {folder}/step-* >/dev/null 2>&1; do sleep 0.05; done
  dd if=/dev/zero of={folder}/ballast bs=1M 2>/dev/null
  until grep -q 'was not saved' {log}; do sleep 0.05; done
  rm {folder}/ballast ) &
exec "$@"
"""


@dataclass(frozen=True)
class Finished:
    """What a run came to."""

    losses: list[float]
    """By step."""

    hashes: dict[str, str]
    """sha256 of each final tensor."""

    said: str


class DrilledRun:
    """Starts a run again and again until it ends by itself."""

    def __init__(
        self, config: Path, output: Path, ranks: int, settings: Mapping[str, object]
    ) -> None:
        self.output = output
        self._log = output.with_suffix(".log")
        self._log.unlink(missing_ok=True)
        self._begins = 0
        self._started = 0.0
        self._waits: list[float] = []
        self._process: subprocess.Popen | None = None
        self._ranks = ranks
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(ranks), "--shutdown-timeout", "60"),
            *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
            *("-m", "megatron_jam.train", "--config", str(config), "--output", str(output)),
            *("--log_every", "1"),
            *(text for name, value in settings.items() for text in (f"--{name}", str(value))),
        ]

    def start(self, *, small_disk: bool = False, **settings: object) -> None:
        """Start torchrun; `small_disk` gives the checkpoints a file system of their own, which is
        full for a while after the first checkpoint."""
        self._begins = self._log.stat().st_size if self._log.exists() else 0
        self._started = time.monotonic()
        more = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        command = [*self._command, *more]
        if small_disk:
            folder = self.output / "checkpoints"
            folder.mkdir(parents=True)
            fill = _FILL.format(size=_SMALL_DISK_BYTES, folder=folder, log=self._log)
            command = ["unshare", "-Urm", "bash", "-c", fill, "bash", *command]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def finish(self, *, small_disk: bool = False, **settings: object) -> Finished:
        """Start it a last time, and let it end.

        Raises:
            UsageError: it failed.
        """
        self.start(small_disk=small_disk, **settings)
        if self.wait() != 0:
            raise UsageError(f"the run failed: {self.said()[-2000:]}")
        lines = [json.loads(x) for x in (self.output / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
        provenance = json.loads((self.output / "weights" / "provenance.json").read_text())
        return Finished(
            [losses[step] for step in sorted(losses)], provenance["sha256"], self.said()
        )

    def wait(self, *, timeout: float = _PATIENCE) -> int:
        """Wait until torchrun has ended; its status.

        Raises:
            UsageError: it has not, in time.
        """
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise UsageError(f"the run has not ended in {timeout:g} s") from error

    def sleep(self, seconds: float) -> None:
        """Let it run, unless it ends."""
        assert self._process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Wait until this start has come to `step`, or the run has ended."""
        path, end = self.output / "metrics.jsonl", time.monotonic() + _PATIENCE
        assert self._process is not None
        while self._process.poll() is None and time.monotonic() < end:
            # The file is cut back when a run goes on; the log tells that this start makes steps.
            if " step " in self.said():
                if self._started:
                    self._waits.append(time.monotonic() - self._started)
                    self._started = 0.0
                lines = path.read_text().splitlines() if path.exists() else []
                steps = [json.loads(x)["step"] for x in lines if x.endswith("}")]
                if max(steps, default=0) >= step:
                    return
            time.sleep(0.02)
        raise UsageError(f"the run has not come to step {step}: {self.said()[-1000:]}")

    def kill_rank(self, rank: int) -> None:
        """kill -9."""
        self._rank(rank).kill()

    def stop_rank(self, rank: int) -> None:
        """Let it answer no more."""
        self._rank(rank).suspend()

    def _rank(self, rank: int) -> psutil.Process:
        assert self._process is not None
        end = time.monotonic() + _RANK_WAIT
        while time.monotonic() < end:
            try:
                for child in psutil.Process(self._process.pid).children():
                    if child.environ().get("RANK") == str(rank):
                        return child
            except psutil.Error:
                pass  # between fork and exec, or gone
            time.sleep(0.01)
        raise UsageError(f"rank {rank} is not there: {self.said()[-1000:]}")

    def signal(self, name: str) -> None:
        """Send a signal to torchrun, as a batch system does."""
        assert self._process is not None
        self._process.send_signal(signal.Signals[name])

    def touch_stop(self) -> None:
        """Ask by file, as a batch script does."""
        self.output.mkdir(exist_ok=True)
        (self.output / "stop").touch()

    def expect_requeue(self) -> None:
        """Raise UsageError unless the run says that it is to be started again."""
        if not (self.output / "requeue").is_file():
            raise UsageError(f"the run is not marked for requeueing: {self.said()[-2000:]}")

    def said(self) -> str:
        """What this start has written to its terminal."""
        with self._log.open("rb") as file:
            file.seek(self._begins)
            return file.read().decode(errors="replace")

    def told(self) -> str:
        """How often it went on from a checkpoint, and how long a start takes."""
        resumed = self._log.read_text(errors="replace").count("resumed from")
        wait = statistics.median(self._waits) if self._waits else float("nan")
        return f"resumed {resumed} times, {wait:.1f} s from a start to its first step (median)"


def make_material(folder: Path) -> Path:
    """A JAM-Cross of a minute with a set of texts; the settings of its run."""
    from tools import init, prepare_text, train_text_tokenizer

    settings = folder / "run.yaml"
    if settings.is_file():
        return settings
    material = folder / "material"
    shutil.rmtree(material, ignore_errors=True)
    material.mkdir()
    texts, tokenizer = material / "texts.jsonl", material / "tokenizer"
    _write_texts(texts)
    tower = {"num_layers": 2, "hidden_size": 64, "num_heads": 4}
    towers = {"image": tower, "text": tower}
    model = {"towers": towers, "max_positions": 64, "bridges": {"every": 2}}
    (material / "model.yaml").write_text(yaml.safe_dump(model))
    train_text_tokenizer.main(
        [str(texts)], str(tokenizer), vocab_size=320, num_image_codes=16, num_sentinels=4
    )
    prepare_text.main(str(texts), str(tokenizer), str(material / "texts"))
    init.main(material / "model.yaml", tokenizer, material / "weights")
    sets = [{"name": "texts", "path": str(material / "texts")}]
    run = {
        "weights": str(material / "weights"),
        "output": str(folder / "unused"),
        "data": {"sets": sets, "objective": "cm3"},
        "validation": sets,
        "steps": 60,
        "validate_every": 10,
        "checkpoint_every": 3,
        "context_length": 64,
        "global_batch_size": 4,
        "dropout": 0.1,
        "optimizer": {"warmup_steps": 5, "learning_rate": 1e-3},
    }
    settings.write_text(yaml.safe_dump(run))
    return settings


def _write_texts(path: Path) -> None:
    words = [
        "the",
        "sea",
        "is",
        "calm",
        "and",
        "wide",
        "but",
        "ships",
        "are",
        "small",
        "at",
        "night",
    ]
    lines = []
    for i in range(400):
        text = " ".join(words[(i * 7 + j * j + i * j) % len(words)] for j in range(5 + i % 23))
        lines.append(json.dumps({"text": text}) + "\n")
    path.write_text("".join(lines))
