"""Whether this node can take part in a run: one line, `NODE ok WHAT_IT_HAS` or `NODE bad: WHY`.

`WHAT_IT_HAS` is to be the same on all nodes of a job.
"""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from megatron_jam.config.cli import run_command

PACKAGES = ("megatron-jam", "torch", "megatron-core", "numpy")
"""Those whose versions nodes are to share."""

MAX_USED_MIB = 1024
"""Memory that a GPU with nothing on it may have in use."""


def main(
    node: str,
    head: str,
    output: Path,
    *,
    ranks: int = 8,
    device: Literal["cuda", "cpu"] = "cuda",
    min_free_gb: float = 500,
) -> None:
    """Check a node and print one line.

    Args:
        node: its name.
        head: the host where the nodes meet.
        output: the run's folder.
        ranks: ranks that it will have.
        device: what they compute on.
        min_free_gb: space that the run's folder needs.
    """
    reasons = [*_network(head), *_storage(output, node, min_free_gb), *_packages()]
    holds = [] if reasons else [f"{name} {version(name)}" for name in PACKAGES]
    if device == "cuda":
        gpus, faults = _gpus(ranks)
        holds += gpus
        reasons += faults
        reasons += [] if reasons else _products(ranks)
    # In one write, so that nodes' lines do not mix.
    sys.stdout.write(
        f"{node} bad: {'; '.join(reasons)}\n" if reasons else f"{node} ok {', '.join(holds)}\n"
    )


def _network(head: str) -> Iterator[str]:
    try:
        socket.getaddrinfo(head, None)
    except OSError as error:
        yield f"does not know the first host {head} ({error.strerror})"


def _storage(output: Path, node: str, min_free_gb: float) -> Iterator[str]:
    mark = output / f".{node}.check"
    try:
        mark.touch()
        mark.unlink()
        free = shutil.disk_usage(output).free / 1e9
    except OSError as error:
        yield f"cannot write to {output} ({error.strerror})"
        return
    if free < min_free_gb:
        yield f"{output} has {free:.0f} GB left, {min_free_gb:.0f} are wanted"


def _packages() -> Iterator[str]:
    """What a rank imports first; the extension is compiled, for one torch and one processor."""
    try:
        import torch

        import megatron_jam.ops.extension  # noqa: F401

        assert torch.ones(2).sum() == 2
    except Exception as error:
        yield f"cannot import megatron_jam: {type(error).__name__}: {error}".splitlines()[0]


def _gpus(ranks: int) -> tuple[list[str], list[str]]:
    """What they are, and their faults as the driver knows them: their number, memory that an
    earlier job left in use, uncorrected errors."""
    fields = "index,name,driver_version,memory.used,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], [f"nvidia-smi fails ({type(error).__name__})"]
    if done.returncode:
        return [], [f"nvidia-smi fails: {' '.join(done.stdout.split()) or done.returncode}"]
    rows = [[each.strip() for each in line.split(",")] for line in done.stdout.splitlines()]
    faults = [] if len(rows) == ranks else [f"{len(rows)} GPUs, {ranks} are wanted"]
    for index, _, _, used, errors in rows:
        if used.isdigit() and int(used) > MAX_USED_MIB:
            faults.append(f"GPU {index} has {used} MiB in use by another program")
        if errors.isdigit() and int(errors):  # [N/A] without ECC
            faults.append(f"GPU {index} has {errors} uncorrected memory errors")
    kinds = sorted({f"{name} (driver {driver})" for _, name, driver, *_ in rows})
    return [f"{len(rows)} x {' and '.join(kinds)}"], faults


def _products(ranks: int) -> Iterator[str]:
    """Each GPU multiplies small whole numbers, which every precision holds exactly."""
    import torch

    if torch.accelerator.device_count() != ranks:
        yield f"torch finds {torch.accelerator.device_count()} GPUs, {ranks} are wanted"
        return
    numbers = torch.randint(-8, 8, (2048, 2048), generator=torch.Generator().manual_seed(0)).float()
    expected = numbers @ numbers
    for index in range(ranks):
        device = torch.device("cuda", index)
        try:
            wrong = (numbers.to(device) @ numbers.to(device)).cpu() != expected
        except RuntimeError as error:
            yield f"GPU {index} fails: {error}".splitlines()[0]
            continue
        if wrong.any():
            yield f"GPU {index} computes wrongly"


if __name__ == "__main__":
    run_command(main)
