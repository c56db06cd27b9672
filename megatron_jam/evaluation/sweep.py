"""A sweep of layouts: which are tried, how each runs by itself, and the table of what came out."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import check_layout
from megatron_jam.training.throughput import Trial

COLUMNS = ("layout", "tokens/s/rank", "TFLOP/s", "(full)", "MFU", "memory GB", "ms", "over earlier")


def possible_layouts(model: ModelConfig, ranks: int) -> Iterator[ParallelConfig]:
    """Every TP (with sequence parallelism) x PP of powers of two that the model and ranks take."""
    powers = [1 << n for n in range(ranks.bit_length())]
    for tensor in (each for each in powers if each <= 8):
        for pipeline in powers:
            if ranks % (tensor * pipeline) or pipeline > model.num_layers:
                continue
            layout = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=tensor > 1)
            try:
                check_layout(model, layout)
            except UsageError:
                continue
            yield layout


def run_trial(trial: Trial, *, timeout: float) -> dict[str, Any]:
    """Time a trial in processes of its own, one for each rank of the default (gloo) group; all
    ranks take part. A rank that fails ends the others'.

    Returns:
        The figures, or {"failure": reason}; the same on all ranks.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    meeting: list[Any] = [(socket.gethostname() if size > 1 else "127.0.0.1", _free_port())]
    dist.broadcast_object_list(meeting)
    host = os.environ.get("MASTER_ADDR", meeting[0][0])
    variables = os.environ | {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(meeting[0][1]),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, result, told = (Path(folder, name) for name in ("trial", "result", "told"))
        trial.save(asked)
        command = [sys.executable, "-m", "megatron_jam.training.throughput", asked, result]
        with told.open("w") as log:
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            reason = _wait(process, told, timeout)
        found: list[Any] = [json.loads(result.read_text()) if result.is_file() else {}]
    reasons: list[str] = [""] * size
    dist.all_gather_object(reasons, reason)
    dist.broadcast_object_list(found)
    # A rank that was ended because another one failed has nothing to say of its own.
    own = [each for each in reasons if each and each != ENDED]
    return {"failure": own[0]} if own else found[0]


ENDED = "ended"


def _wait(process: subprocess.Popen, told: Path, timeout: float) -> str:
    """Why the process failed, if it did; ENDED if another rank's did first."""
    end = time.monotonic() + timeout
    reason = ""
    while True:
        status = process.poll()
        if status:
            reason = _reason(told, status)
        elif status is None and time.monotonic() > end:
            reason = f"not done after {timeout:.0f} s"
        states: list[tuple[bool, str]] = [(False, "")] * dist.get_world_size()
        dist.all_gather_object(states, (status is not None, reason))
        if any(failed for _, failed in states):
            process.kill()
            process.wait()
            return reason or ENDED
        if all(done for done, _ in states):
            return ""
        time.sleep(0.2)


def _reason(told: Path, status: int) -> str:
    lines = told.read_text(errors="replace").splitlines()
    reasons = [line.removeprefix("reason: ") for line in lines if line.startswith("reason: ")]
    return reasons[0] if reasons else f"exit status {status}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def as_table(rows: Sequence[Mapping[str, Any]], earlier: Mapping[str, Mapping[str, Any]]) -> str:
    """The sweep to read, fastest first, and what failed with its reason behind; `earlier` has the
    rows of another sweep by name."""
    worked = [row for row in rows if "failure" not in row]
    worked.sort(key=lambda row: -row["tokens_per_second_per_rank"])
    cells = [COLUMNS, *(_cells(row, earlier.get(row["name"], {})) for row in worked)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    failed = [row for row in rows if "failure" in row]
    return "\n".join([*lines, *(f"{row['name']}: {row['failure']}" for row in failed)])


def _cells(row: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[str, ...]:
    speed = row["tokens_per_second_per_rank"]
    ratio = speed / before["tokens_per_second_per_rank"] if before.get("seconds_per_step") else 0
    return (
        row["name"],
        f"{speed:,.0f}",
        f"{row['tflops']:.3g}",
        f"{row['tflops_full']:.3g}",
        "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['peak_memory_bytes'] / 1e9:.2f}",
        f"{1e3 * row['seconds_per_step']:.0f}",
        f"{ratio:.2f}" if ratio else "",
    )
