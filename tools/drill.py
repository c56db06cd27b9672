"""Prove that a run survives kills, signals, a full disk, a hanging rank, a damaged checkpoint."""

import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_settings
from megatron_jam.config.log import logger

# As a script it would find its own folder alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.drilled_run import DrilledRun, Finished, make_material


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a drill went."""

    drill: str
    passed: bool
    seconds: float
    told: str


class Drills:
    """Drills of one configuration; each ends with the weights of the undisturbed run."""

    def __init__(self, config: Path, folder: Path, ranks: int, kills: int, seed: int) -> None:
        self._config, self._folder, self._ranks = config, folder, ranks
        self._kills, self._random = kills, random.Random(seed)
        self._steps = int(read_settings(config)["steps"])
        self._expected: Finished | None = None

    def _run(self, name: str, **settings: object) -> DrilledRun:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        return DrilledRun(self._config, self._folder / name, self._ranks, settings)

    def undisturbed(self) -> str:
        """A run to compare with."""
        self._expected = self._run("undisturbed").finish()
        return f"{self._steps} steps"

    def kill(self) -> str:
        """kill -9 of a random rank at random times: while starting, training, saving, measuring."""
        run = self._run("kill")
        starting = 0
        for number in range(self._kills):
            run.start()
            if self._random.random() < 0.2:
                starting += 1
                run.sleep(self._random.uniform(0, 8))
            else:
                due = self._steps * (number + self._random.random()) / (self._kills + 1)
                run.wait_for_step(int(due))
                run.sleep(self._random.uniform(0, 0.5))
            run.kill_rank(self._random.randrange(self._ranks))
            run.wait()
        self._compare(run.finish())
        return f"{self._kills} kills, {starting} of them while starting; {run.told()}"

    def signals(self) -> str:
        """SIGTERM, SIGUSR1, SIGINT to torchrun and a stop file, at random moments."""
        run = self._run("signals")
        ways: list[Callable[[], None]] = [
            lambda: run.signal("SIGTERM"),
            lambda: run.signal("SIGUSR1"),
            lambda: run.signal("SIGINT"),
            run.touch_stop,
        ]
        for number, ask in enumerate(ways):
            run.start()
            run.wait_for_step(self._steps * (number + 1) // (len(ways) + 1))
            run.sleep(self._random.uniform(0, 0.3))
            ask()
            run.wait()
            run.expect_requeue()
        run.touch_stop()  # before it has begun
        run.start()
        run.wait()
        run.expect_requeue()
        self._compare(run.finish())
        return f"{len(ways) + 1} requests, each saved and marked for requeueing; {run.told()}"

    def disk(self) -> str:
        """A disk that is full when a checkpoint is due, and empty again later."""
        run = self._run("disk", keep_checkpoints=1)
        finished = run.finish(small_disk=True)
        if "training goes on; the next save is tried in its turn" not in finished.said:
            raise UsageError("the disk was full, and nobody said so")
        self._compare(finished)
        return next(line for line in finished.said.splitlines() if "was not saved" in line)[9:100]

    def hang(self) -> str:
        """A rank that stops answering: SIGSTOP."""
        run = self._run("hang", **{"health.hang_seconds": 10})
        run.start()
        run.wait_for_step(self._steps // 2)
        stopped = self._ranks - 1
        run.stop_rank(stopped)
        run.wait(timeout=120)
        said = run.said()
        line = next((x for x in said.splitlines() if "no progress for 10 s" in x), "")
        if f"rank {stopped} does not answer: it was at" not in line:
            raise UsageError(f"who hangs was not said: {line or said[-2000:]}")
        if not (run.output / "stacks" / "rank-00000.txt").is_file():
            raise UsageError("no stacks were written")
        self._compare(run.finish())
        return line[9:]

    def damage(self) -> str:
        """A flipped byte in the newest checkpoint is named, and the one before taken if asked."""
        run = self._run("damage")
        run.start()
        run.wait_for_step(self._steps * 2 // 3)
        run.touch_stop()
        run.wait()
        checkpoints = sorted((run.output / "checkpoints").glob("step-????????"))
        file = max(checkpoints[-1].glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        run.start()
        run.wait()
        expected = f"{file} has other bytes than were written"
        if expected not in run.said():
            raise UsageError("the damage was not named")
        self._compare(run.finish(on_damage="previous"))
        return f"{file.parent.name}/{file.name} named; went on from {checkpoints[-2].name}"

    def _compare(self, finished: Finished) -> None:
        assert self._expected is not None
        if finished.losses != self._expected.losses:
            raise UsageError("the losses are not those of the undisturbed run")
        if finished.hashes != self._expected.hashes:
            raise UsageError("the weights are not those of the undisturbed run")


DRILLS = ("kill", "signals", "disk", "hang", "damage")


def main(
    output: Path,
    *,
    config: Path | None = None,
    only: list[str] | None = None,
    ranks: int = 2,
    kills: int = 20,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Disturb training runs on this machine and compare their weights with an undisturbed run's.

    Each drill is a run of its own under torchrun, with real kills and signals. It passes if all
    losses and the sha256 of every final tensor are those of the undisturbed run.

    Args:
        output: folder for the runs; emptied drill by drill.
        config: settings of the run, with checkpoint_every; default a model of a minute made here.
        only: some of kill, signals, disk, hang, damage; default all.
        ranks: ranks of each run.
        kills: kills of the drill `kill`.
        seed: of the random moments.
        json: print one JSON line a drill, in place of text.
    """
    chosen = only or list(DRILLS)
    if not set(chosen) <= set(DRILLS):
        raise UsageError(f"only is {chosen}; it may hold {', '.join(DRILLS)}")
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    drills = Drills(config or make_material(output), output, ranks, kills, seed)
    passed = True
    for name in ("undisturbed", *chosen):
        begun = time.perf_counter()
        try:
            told, good = getattr(drills, name)(), True
        except UsageError as error:
            told, good = str(error), False
        outcome = Outcome(
            drill=name, passed=good, seconds=round(time.perf_counter() - begun, 1), told=told
        )
        text = f"{name:12} {'passed' if good else 'FAILED'} {outcome.seconds:7.1f} s  {told}"
        sys.stdout.write((dumps(asdict(outcome)) if json else text) + "\n")
        sys.stdout.flush()
        passed = passed and good
        if not good and name == "undisturbed":
            break
    if not passed:
        raise UsageError("a drill failed: see its folder's log.txt")
    logger.info("all drills passed")


if __name__ == "__main__":
    run_command(main)
