"""Stand-ins for sbatch, srun and scontrol, as far as examples/slurm uses them, on one machine.

`install` puts them into a folder for PATH. A node is an address of the loopback network, at which
its processes really are. Options and commands that examples/slurm has no use for are refused. What
they do was compared with Slurm 22.05 (docs/status.md).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol")
NODES = "127.0.0.[1-2]"
STATE = "SLURM_STAND_INS"
"""Variable with the folder in which jobs are."""

NEARLY_OVER = "SLURM_STAND_IN_NEARLY_OVER"
"""Variable with a path: when it is there, a job's first start gets the signal of --signal."""

DOWN = "SLURM_STAND_IN_DOWN"
"""Variable with a node on which nothing runs."""

JOB_ID = 4711

JOB_OPTIONS = {
    "array", "cpus-per-task", "exclusive", "gpus-per-node", "job-name", "mem", "nodes",
    "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time", "wait",
}  # fmt: skip
STEP_OPTIONS = {"nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "kill-on-bad-exit"}


def install(folder: Path) -> dict[str, str]:
    """Write the commands into `folder`/bin; returns the variables that they need."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for name in COMMANDS:
        path = binaries / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {name} "$@"\n')
        path.chmod(0o755)
    return {STATE: str(folder), "PATH": f"{binaries}:{os.environ['PATH']}"}


def sbatch(arguments: list[str]) -> int:
    """Run a job to its end, requeued as often as it asks for; its log is the --output file."""
    given, (script, *rest) = options(arguments, JOB_OPTIONS)
    lines = [line.removeprefix("#SBATCH ") for line in Path(script).read_text().splitlines()
             if line.startswith("#SBATCH ")]  # fmt: skip
    settings = options(lines, JOB_OPTIONS)[0] | given
    assert "wait" in settings, "the stand-in of sbatch waits: say --wait"
    folder = Path(os.environ[STATE], f"job-{JOB_ID}")
    folder.mkdir()
    shutil.copy(script, folder / "slurm_script")  # Slurm runs a copy in a folder of its own
    starts = 0
    while True:
        status = _start(folder, settings, rest, starts)
        starts += 1
        if not (folder / "requeue").exists():
            return status
        (folder / "requeue").unlink()


def _start(folder: Path, settings: dict[str, str], arguments: list[str], starts: int) -> int:
    variables = {
        "SLURM_JOB_ID": str(JOB_ID),
        "SLURM_JOB_NUM_NODES": settings["nodes"],
        "SLURM_JOB_NODELIST": NODES,
        "SLURM_CPUS_PER_TASK": settings["cpus-per-task"],
        **({"SLURM_RESTART_COUNT": str(starts)} if starts else {}),
        **({"SLURM_ARRAY_TASK_ID": settings["array"]} if "array" in settings else {}),
    }
    log = settings["output"].replace("%x", settings["job-name"]).replace("%j", str(JOB_ID))
    assert settings["open-mode"] == "append", "a requeued job would begin its log anew"
    with open(log.replace("%A_%a", str(JOB_ID)), "a") as file:
        shell = subprocess.Popen(
            ["bash", folder / "slurm_script", *arguments],
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    (folder / "shell").write_text(str(shell.pid))
    when = os.environ.get(NEARLY_OVER)
    while shell.poll() is None:
        time.sleep(0.05)
        if when and not starts and Path(when).exists():
            # To the batch shell alone: B:
            name = re.fullmatch(r"B:(\w+)@\d+", settings["signal"]).group(1)
            shell.send_signal(signal.Signals[f"SIG{name}"])
            when = None
    return shell.returncode


def srun(arguments: list[str]) -> int:
    """Run a command on each node; with --kill-on-bad-exit one that fails ends the others."""
    given, command = options(arguments, STEP_OPTIONS)
    nodes = hostnames(os.environ["SLURM_JOB_NODELIST"])
    assert given["nodes"] == given["ntasks"] == str(len(nodes))
    assert given["ntasks-per-node"] == "1"
    tasks = [
        subprocess.Popen(
            ["sleep", "600"] if node == os.environ.get(DOWN) else command,
            env=os.environ
            | {"SLURM_NODEID": str(i), "SLURM_NNODES": given["nodes"], "SLURMD_NODENAME": node},
        )
        for i, node in enumerate(nodes)
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [each.send_signal(number) for each in tasks])
    while any(each.poll() is None for each in tasks):
        time.sleep(0.05)
        if given.get("kill-on-bad-exit") == "1" and any(each.returncode for each in tasks):
            for each in tasks:
                each.terminate()
            break
    return max(abs(each.wait()) for each in tasks)


def scontrol(arguments: list[str]) -> int:
    """`show hostnames LIST` and `requeue JOB`, which ends the job's shell with SIGTERM."""
    match arguments:
        case ["show", "hostnames", nodes]:
            print("\n".join(hostnames(nodes)))
        case ["requeue", job]:
            folder = Path(os.environ[STATE], f"job-{job}")
            (folder / "requeue").touch()
            os.kill(int((folder / "shell").read_text()), signal.SIGTERM)
        case _:
            raise AssertionError(f"scontrol {arguments}")
    return 0


def hostnames(nodes: str) -> list[str]:
    """a[1-3] -> a1, a2, a3."""
    stem, first, last = re.fullmatch(r"(.+)\[(\d+)-(\d+)\]", nodes).groups()
    return [f"{stem}{number}" for number in range(int(first), int(last) + 1)]


def options(arguments: list[str], known: set[str]) -> tuple[dict[str, str], list[str]]:
    """Leading --name=value and --name arguments, and what stands behind them."""
    found: dict[str, str] = {}
    for i, each in enumerate(arguments):
        if not each.startswith("--"):
            return found, arguments[i:]
        name, _, value = each.removeprefix("--").partition("=")
        assert name in known, f"unknown option {each}"
        found[name] = value
    return found, []


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
