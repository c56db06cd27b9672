"""Stopping on request: a signal at any rank, or a file in the run's folder, ends it on all ranks.

A batch script asks with `touch OUTPUT/stop`: signals that torchrun gets reach its ranks with little
time left to save, and SIGUSR1 kills torchrun itself. The run then saves, writes OUTPUT/requeue, and
its ranks exit with EXIT_REQUEUE; torchrun makes 1 of any failure, so that a script looks at the
file. The next start of the run removes it and goes on.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.signals import STOPPING, received_signal
from megatron_jam.parallel.world import World

EXIT_REQUEUE = 75
"""Exit status of a rank of a run that was stopped on request: EX_TEMPFAIL, "try again"."""

STOP_FILE, REQUEUE_FILE = "stop", "requeue"

_SIGNALS = [each.name for each in STOPPING]
_FILE = len(_SIGNALS) + 1


class StopRequested(Exception):
    """Somebody asked the run to stop; raised on all ranks at the same place."""


class StopPoll:
    """Asks whether the run is to stop; the answer is the same on all ranks.

    A step has the ranks' messages summed together with something else, and stops behind its end
    with `check`.
    """

    def __init__(self, output: Path, world: World) -> None:
        """Look for the stop file in `output`; what an earlier start of the run left goes."""
        self._world = world
        self._stop, self._requeue = output / STOP_FILE, output / REQUEUE_FILE
        if world.rank == 0:
            self._requeue.unlink(missing_ok=True)
        self._found = 0

    def __call__(self) -> None:
        """Ask and check, on all ranks.

        Raises:
            StopRequested: if any rank got a signal, or the stop file is there.
        """
        self.ask()
        self.check()

    def ask(self) -> None:
        """Find out for `check`, on all ranks."""
        messages = self.message()
        dist.all_reduce(messages)
        self.hear(messages)

    def message(self, *, says: bool = False) -> Tensor:
        """What this rank has to say, to be summed over all ranks for `hear`: which requests it
        got, and whether it `says` yes to something else; float64 [n]."""
        name = received_signal()
        reason = _SIGNALS.index(name) + 1 if name else 0
        if self._world.rank == 0 and not reason and os.path.exists(self._stop):
            reason = _FILE
        words = [float(says)] + [float(reason == each) for each in range(1, _FILE + 1)]
        return torch.tensor(words, dtype=torch.float64, device=self._world.device)

    def hear(self, messages: Tensor) -> bool:
        """Know for `check` what the sum of all ranks' messages says; whether any `says` yes."""
        said, *asked = messages.tolist()
        self._found = max((n for n, count in enumerate(asked, 1) if count), default=0)
        return bool(said)

    def check(self) -> None:
        """Raise StopRequested if the run was to stop when it was last asked."""
        if self._found:
            of_file = self._found == _FILE
            raise StopRequested(str(self._stop) if of_file else _SIGNALS[self._found - 1])

    def leave(self, reason: object, step: int) -> None:
        """Say that the run, which stands at `step`, is to be started again."""
        if self._world.rank == 0:
            write_text_atomically(self._requeue, f"stopped at step {step} by {reason}\n")
        self.ends()

    def ends(self) -> None:
        """The run is over: what it is asked to do now, the next start is not to do."""
        if self._world.rank == 0:
            self._stop.unlink(missing_ok=True)
