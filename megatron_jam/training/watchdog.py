"""Finds a run that makes no progress: who is late, at which step, and what each rank waits for.

A thread on each rank tells the others through torch's store what its main thread does. A rank whose
main thread has shown no progress for too long writes the stacks of all its threads to
OUTPUT/stacks; the first rank that still answers says who is late; then all end, so that torchrun
does.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_jam.config.cli import tell_torchrun
from megatron_jam.config.log import logger
from megatron_jam.parallel.world import World

EXIT_HANG = 70
"""Exit status of the ranks of a run that made no progress."""

STACKS = "stacks"
_ROOT = str(Path(__file__).parents[1])
_SHOWN = 4


class Watchdog:
    """Watches the main thread within a `with` statement."""

    def __init__(
        self,
        output: Path,
        world: World,
        *,
        seconds: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        """Watch for `seconds` without progress; 0 watches nothing.

        Args:
            output: the run's folder.
            world: the ranks; all make a watchdog.
            seconds: see above.
            leave: ends the process with a status.
        """
        self._folder, self._rank, self._size = output / STACKS, world.rank, world.size
        self._seconds, self._leave = seconds, leave
        self._interval = min(10.0, seconds / 5)
        self._store = _own_store() if seconds and world.size > 1 else None
        self._main = threading.get_ident()
        self._step, self._what, self._since = 0, "the start", time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._main = threading.get_ident()
            self._since = time.monotonic()
            self._ended.clear()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def progress(self, step: int, what: str) -> None:
        """The main thread has got on: it is at step `step`, counted from 1, and begins `what`."""
        self._step, self._what, self._since = step, what, time.monotonic()

    def _watch(self) -> None:
        self._rely_on_c()
        while not self._ended.wait(self._interval):
            self._rely_on_c()
            state = self._tell()
            if state["idle"] > self._seconds:
                self._dump(state)
                # The others find out at about the same time; what they say is worth waiting for.
                if not self._ended.wait(2 * self._interval):
                    self._tell()
                    tell_torchrun(self._report())
                self._leave(EXIT_HANG)
                return

    def _rely_on_c(self) -> None:
        """If not even the watching thread gets on, as where C code keeps the interpreter's lock,
        the stacks go to standard error."""
        faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__)

    def _tell(self) -> dict[str, Any]:
        state = {
            "step": self._step,
            "what": self._what,
            "idle": time.monotonic() - self._since,
            "where": _where(sys._current_frames().get(self._main)),
            "at": time.time(),
        }
        if self._store is not None:
            try:
                self._store.set(f"watchdog/{self._rank}", json.dumps(state))
            except RuntimeError:  # its server is gone, and the run with it
                self._store = None
        return state

    def _dump(self, state: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank:05d}.txt"
        with path.open("w", encoding="utf-8") as file:
            file.write(f"rank {self._rank} {_said(state)}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _report(self) -> str:
        """Who is late; said if this is the first rank that answers."""
        states = self._states()
        fresh = 3 * self._interval
        answers = {r: s for r, s in states.items() if s and time.time() - s["at"] < fresh}
        lines = [f"no progress for {self._seconds:g} s; {_late(states, answers)}"]
        if self._rank != min(answers, default=self._rank):
            return lines[0]
        lines += [
            f"  rank {r} {_said(s) if s else 'has never answered'}" for r, s in states.items()
        ]
        report = "\n".join(lines)
        (self._folder / "report.txt").write_text(report + "\n", encoding="utf-8")
        logger.error("%s | stacks and all ranks' states: %s", lines[0], self._folder)
        return lines[0]

    def _states(self) -> dict[int, dict[str, Any] | None]:
        """What each rank said last."""
        if self._store is None:
            return {self._rank: self._tell()}
        keys = {rank: f"watchdog/{rank}" for rank in range(self._size)}
        return {
            rank: json.loads(self._store.get(key)) if self._store.check([key]) else None
            for rank, key in keys.items()
        }


def _late(
    states: Mapping[int, Mapping[str, Any] | None], answers: Mapping[int, Mapping[str, Any]]
) -> str:
    """Which ranks the others wait for."""
    silent = [rank for rank in states if rank not in answers]
    if silent:
        return _several(silent, states, "does not answer")
    first = min(each["step"] for each in answers.values())
    behind = [rank for rank, each in answers.items() if each["step"] == first]
    if len(behind) == len(answers):
        behind = [rank for rank, each in answers.items() if not each["where"].startswith("waits")]
    if not behind:
        return "all ranks wait for each other"
    return _several(behind, states, "is late")


def _several(ranks: list[int], states: Mapping[int, Mapping[str, Any] | None], verb: str) -> str:
    shown = [
        f"rank {rank} {verb}: it {_said(state) if (state := states[rank]) else 'never did'}"
        for rank in ranks[:_SHOWN]
    ]
    return "; ".join(shown) + (f"; and {len(ranks) - _SHOWN} more" if ranks[_SHOWN:] else "")


def _said(state: Mapping[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(state["at"] - state["idle"]))
    return f"was at {state['what']} of step {state['step']} since {since} and {state['where']}"


def _where(frame: FrameType | None) -> str:
    """What a thread does: the collective that it waits in, if any, and our line that called it."""
    call = ours = ""
    while frame is not None and not ours:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "torch/distributed/" in path and not name.startswith("_") and name != "wrapper":
            call = name
        elif path.startswith(_ROOT):
            ours = f"{path[len(_ROOT) + 1 :]}:{frame.f_lineno}, {name}"
        frame = frame.f_back
    return f"waits in {call} ({ours})" if call else f"is in {ours or 'code of others'}"


def _own_store() -> dist.Store:
    """A connection of its own: the main thread may be waiting on the one that it has."""
    return dist.distributed_c10d._get_default_store().clone()
