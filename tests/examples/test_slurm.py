"""The batch scripts of examples/slurm, on stand-ins for Slurm's commands."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import RunConfig
from tests.helpers import slurm_stand_ins
from tests.helpers.commands import ROOT
from tests.helpers.pool import WorkerPool
from tests.helpers.training import losses, run_material, run_training, settings, tensors

RUN = """#!/usr/bin/env bash
# In place of Python: settings are right, nodes are well and a run is a few lines of shell.
case "$1 ${2:-}" in
*resolve.py*) if [[ -n ${SETTINGS:-} ]]; then exec REAL "$@"; else echo run; fi ;;
*check_node.py*) echo "$2 ${NODE_IS:-ok packages}${UNLIKE:+ of $2}" ;;
*torch.distributed.run*)
    printf '%s\\n' "$*" >>"$NOTES/commands"
    OUTPUT=$PWD/run
    if [[ $* != *is_host=1* ]]; then sleep 0.3; exit "${STATUS:-0}"; fi
    case "${RUN_DOES:-ends}" in
    waits)
        [[ ${SLURM_RESTART_COUNT:-0} == "${LAST_START:-1}" ]] && exit 0
        touch "$NOTES/steps"
        until [[ -e $OUTPUT/stop ]]; do sleep 0.05; done
        rm "$OUTPUT/stop"
        echo "stopped at step $((7 + ${SLURM_RESTART_COUNT:-0} * ${PROGRESS:-1})) by it" \\
            >"$OUTPUT/requeue"
        exit 1 ;;
    esac
    exit "${STATUS:-0}" ;;
esac
"""

SETTINGS = """
weights: weights
output: run
data: {sets: [{name: text, path: set}]}
steps: 10
context_length: 32
global_batch_size: 8
"""


class Cluster:
    """Two nodes of two ranks in a folder with the project's scripts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "run"
        for name in ("examples", "megatron_jam"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "run.yaml").write_text(SETTINGS)
        python = folder / "python"
        python.write_text(RUN.replace("REAL", sys.executable))
        python.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment = kept | slurm_stand_ins.install(folder / "slurm")
        self.environment |= {"PYTHONPATH": str(ROOT), "PYTHON": str(python), "NOTES": str(folder)}
        self.environment |= {"RANKS_PER_NODE": "2", "DEVICE": "cpu", "MIN_FREE_GB": "0"}

    def submit(
        self, *arguments: str, script: str = "alignment", options: tuple[str, ...] = (), **env: str
    ) -> tuple[int, str]:
        """The job's status and log."""
        command = ["sbatch", "--wait", "--nodes=2", "--output=log", *options]
        command += [f"examples/slurm/{script}.sbatch", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | env, capture_output=True, timeout=240
        )
        assert done.stderr == b"", done.stderr.decode()
        return done.returncode, (self.folder / "log").read_text()

    def commands(self) -> list[str]:
        """What torchrun was called with, on each node and in each start."""
        path = self.folder / "commands"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_nodes_meet_at_the_first_host(cluster: Cluster) -> None:
    status, log = cluster.submit("run.yaml", "--steps", "5")
    assert status == 0, log
    first, second = sorted(cluster.commands(), key=lambda each: "is_host=0" in each)
    for command in (first, second):
        assert "--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d" in command
        assert f"--rdzv-endpoint 127.0.0.1:{10000 + slurm_stand_ins.JOB_ID}" in command
        assert f"--rdzv-id {slurm_stand_ins.JOB_ID}-0" in command
        assert command.endswith("-m megatron_jam.train --config run.yaml --steps 5")
    assert "is_host=1" in first
    assert "--local-addr 127.0.0.1 " in first
    assert "is_host=0" in second
    assert "--local-addr 127.0.0.2 " in second
    assert "4 ranks on 127.0.0.[1-2]; run" in log
    assert "nodes: 2 ok packages" in log


def test_near_its_end_a_job_stops_and_goes_back_into_the_queue(cluster: Cluster) -> None:
    status, log = cluster.submit(
        "run.yaml", RUN_DOES="waits", **{slurm_stand_ins.NEARLY_OVER: str(cluster.folder / "steps")}
    )
    assert status == 0, log
    assert "SIGUSR1: the run is asked to save and stop" in log
    assert "stopped at step 7; back into the queue" in log
    assert "start 2" in log
    assert "start 3" not in log
    assert [f"--rdzv-id {slurm_stand_ins.JOB_ID}-1" in each for each in cluster.commands()] == (
        [False, False, True, True]
    )
    assert not (cluster.output / "stop").exists()


@pytest.mark.parametrize("ask", ["by hand", "SIGTERM"])
def test_a_run_stopped_in_another_way_is_not_requeued(cluster: Cluster, ask: str) -> None:
    """By `touch OUTPUT/stop`, or by scancel, whose SIGTERM reaches the batch shell as well."""
    waits = cluster.environment | {"RUN_DOES": "waits"}
    command = ["sbatch", "--wait", "--nodes=2", "--output=log"]
    job = subprocess.Popen(
        [*command, "examples/slurm/alignment.sbatch", "run.yaml"], cwd=cluster.folder, env=waits
    )
    wait_for(cluster.folder / "steps")
    if ask == "by hand":
        (cluster.output / "stop").touch()
    else:
        shell = cluster.folder / f"slurm/job-{slurm_stand_ins.JOB_ID}/shell"
        os.kill(int(shell.read_text()), 15)
    assert job.wait(60) == 0
    log = (cluster.folder / "log").read_text()
    assert "stopped at step 7; the same sbatch goes on from there" in log
    assert "start 2" not in log


def test_starts_without_a_step_between_them_end(cluster: Cluster) -> None:
    (cluster.output).mkdir()
    (cluster.output / "requeue").write_text("stopped at step 7 by SIGUSR1\n")
    status, log = cluster.submit(
        "run.yaml", RUN_DOES="waits", **{slurm_stand_ins.NEARLY_OVER: str(cluster.folder / "steps")}
    )
    assert status == 1
    assert "two starts in a row have stopped at step 7" in log


def test_a_failed_run_fails_the_job(cluster: Cluster) -> None:
    status, log = cluster.submit("run.yaml", STATUS="3")
    assert status in (3, 15), log  # srun's: of the first node that failed, or of those it ended
    assert f"what each rank said is in run/logs/{slurm_stand_ins.JOB_ID}-0" in log
    assert "start 2" not in log


def test_a_node_that_does_not_answer_is_named(cluster: Cluster) -> None:
    status, log = cluster.submit(
        "run.yaml", CHECK_SECONDS="1", **{slurm_stand_ins.DOWN: "127.0.0.2"}
    )
    assert status == 1
    assert "node 127.0.0.2 has not answered" in log
    assert "error: 1 of 2 nodes cannot take part: submit again with --exclude=127.0.0.2" in log
    assert cluster.commands() == []


def test_a_node_that_is_not_well_says_why(cluster: Cluster) -> None:
    status, log = cluster.submit("run.yaml", NODE_IS="bad: GPU 3 computes wrongly")
    assert status == 1
    assert "node 127.0.0.1 bad: GPU 3 computes wrongly" in log
    assert "submit again with --exclude=127.0.0.1,127.0.0.2" in log
    assert cluster.commands() == []


def test_nodes_with_unlike_packages_do_not_start(cluster: Cluster) -> None:
    status, log = cluster.submit("run.yaml", UNLIKE="1")
    assert status == 1
    assert "error: nodes differ in what is installed on them" in log
    assert cluster.commands() == []


@pytest.mark.parametrize(("place", "name"), [("0", "cross_none"), ("5", "width_average")])
def test_an_array_takes_its_ablation(cluster: Cluster, place: str, name: str) -> None:
    status, log = cluster.submit("--seed", "1", script="ablations", options=(f"--array={place}",))
    assert status == 0, log
    for command in cluster.commands():
        assert command.endswith(f"--config examples/configs/ablations/{name}.yaml --seed 1")


def test_wrong_settings_end_before_any_node(cluster: Cluster) -> None:
    status, log = cluster.submit("run.yaml", "--steps", "many", SETTINGS="real")
    assert status == 2
    (line,) = log.splitlines()
    assert line.startswith("error: ")
    assert "steps" in line
    assert cluster.commands() == []


def test_a_dry_run_shows_command_and_settings(cluster: Cluster) -> None:
    """Without Slurm: for the nodes that the script asks for."""
    command = ["bash", "examples/slurm/instruction.sbatch", "run.yaml", "--global_batch_size", "16"]
    environment = cluster.environment | {"DRY_RUN": "1", "SETTINGS": "real"}
    done = subprocess.run(
        command, cwd=cluster.folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    shown, settings = done.stdout.split("# settings:\n")
    assert shown.startswith("# 16 ranks: 8 nodes x 2; on each node:\n")
    assert "-m torch.distributed.run --nnodes 8 --nproc-per-node 2 " in shown
    assert " -m megatron_jam.train --config run.yaml --global_batch_size 16 " in shown
    assert "NCCL_DEBUG=WARN" in shown
    assert "\nglobal_batch_size: 16\n" in settings
    assert "\nsteps: 10\n" in settings
    assert not cluster.output.exists()
    assert cluster.commands() == []


@pytest.mark.parametrize(
    ("script", "configs"),
    [
        ("alignment", ["alignment/cross"]),
        ("instruction", ["instruction/with_pairs"]),
        (
            "ablations",
            [
                f"ablations/{name}"
                for name in (
                    *(f"cross_{bridges}" for bridges in ("none", "every1", "every2", "every4")),
                    *(f"width_{kind}" for kind in ("copy", "average")),
                )
            ],
        ),
    ],
)
def test_scripts_name_configurations_that_fit_their_ranks(script: str, configs: list[str]) -> None:
    text = (ROOT / f"examples/slurm/{script}.sbatch").read_text()
    nodes, gpus = (
        int(re.search(rf"--{option}=(\d+)", text).group(1)) for option in ("nodes", "gpus-per-node")
    )
    resolve = runpy.run_path(str(ROOT / "examples/slurm/resolve.py"))["resolve"]
    for name in configs:
        assert Path(name).name in text
        config = resolve(nodes * gpus, ["--config", str(ROOT / f"examples/configs/{name}.yaml")])
        assert str(config.output) == f"outputs/{name}"


@pytest.mark.slow
def test_two_nodes_train_are_preempted_requeued_and_end_as_if_undisturbed(
    cluster: Cluster, pool: WorkerPool, tmp_path: Path
) -> None:
    """The real thing but for Slurm: two nodes of two ranks, torchrun on each, TP 2 x DP 2."""
    parallel, steps = ParallelConfig(tensor=2), 40
    values = settings(run_material(tmp_path / "material"), tmp_path / "calm", parallel, steps=steps)
    pool.run(run_training, parallel, values, data=2)
    RunConfig(**{**values, "output": Path("run")}).save(cluster.folder / "real.yaml")
    status, log = cluster.submit(
        "real.yaml",
        PYTHON=sys.executable,
        **{slurm_stand_ins.NEARLY_OVER: str(cluster.output / "metrics.jsonl")},
    )
    assert status == 0, log
    assert "back into the queue" in log
    assert "resumed from" in log
    assert "start 2" in log
    assert "start 3" not in log
    stopped = int(log.split("stopped at step ")[1].split(";")[0])
    assert 0 < stopped < steps
    assert len(losses(tmp_path / "calm")) == steps
    assert losses(cluster.output) == losses(tmp_path / "calm")
    calm, requeued = tensors(tmp_path / "calm"), tensors(cluster.output)
    assert all(torch.equal(calm[name], requeued[name]) for name in calm)
    said = sorted(path.name for path in cluster.output.glob("logs/*/*"))
    assert said == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not come"
        time.sleep(0.05)


def test_each_task_of_the_array_prepares_its_shard(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "examples/slurm/prepare.sbatch", "prepare_text", "a b.jsonl", "T", "sets/x"],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "PYTHON": "echo",
            "SLURM_ARRAY_TASK_ID": "5",
            "SLURM_CPUS_PER_TASK": "3",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "tools/prepare_text.py a b.jsonl T sets/x --shard 5/64 --workers 3\n"
