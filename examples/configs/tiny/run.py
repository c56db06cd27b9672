"""Run the phases' tiny twins on two CPU ranks, each in under a minute.

    python -m examples.configs.tiny.run [--folder FOLDER] [--phases '[alignment/cross, ...]']

A twin is its phase's own configuration with steps.yaml or replicas.yaml laid over it, in a folder
that has all that the phase names, in small: what it trains on, blends, counts and measures is the
phase's.
"""

import subprocess
import sys
from pathlib import Path

from examples.configs.tiny.workspace import HERE, build_workspace, fuse_all
from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger

PARENTS = ("cm3leon_350m", "cm3leon_760m", "cm3leon_7b", "llm", "llm_4096")
PHASES = (
    *(f"parents/{name}" for name in PARENTS),
    *(f"alignment/{name}" for name in ("uniform", "width", "cross")),
    *(f"instruction/{name}" for name in ("with_pairs", "without_pairs", "one_node")),
    *(f"ablations/cross_{name}" for name in ("none", "every1", "every2", "every4")),
    *(f"ablations/width_{name}" for name in ("copy", "average")),
)
"""All phases, each behind those that it begins from."""


def arguments(phase: str) -> list[str]:
    """The options of training that make a phase's twin."""
    overlay = "replicas" if phase.startswith("instruction/") else "steps"
    files = (HERE.parent / f"{phase}.yaml", HERE / f"{overlay}.yaml")
    return [option for file in files for option in ("--config", str(file))]


def main(folder: Path = Path("outputs/tiny"), *, phases: list[str] | None = None) -> None:
    """Build FOLDER's data and parents, then train the phases one after the other.

    Args:
        folder: where everything goes.
        phases: which; by default all. What a phase begins from must be trained before.
    """
    chosen = list(PHASES) if phases is None else phases
    for phase in chosen:
        if phase not in PHASES:
            raise UsageError(f"unknown phase {phase}; known: {', '.join(PHASES)}")
    if not (folder / "weights").exists():
        build_workspace(folder)
    for phase in chosen:
        if not phase.startswith("parents/") and not (folder / "weights" / "uniform").exists():
            fuse_all(folder)
        logger.info("%s", phase)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        training = ["--nproc_per_node", "2", "-m", "megatron_jam.train", *arguments(phase)]
        if subprocess.run([*torchrun, *training], cwd=folder, check=False).returncode:
            raise UsageError(f"the twin of {phase} failed: see above")


if __name__ == "__main__":
    run_command(main)
