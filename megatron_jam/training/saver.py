"""When a run saves, whether it waits for it, and what it does when a save fails."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_jam.config.log import logger
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.checkpoint import Checkpoints, SaveFailed, step_of

MAX_FAILED = 3
"""Saves that may fail in a row; a full disk may be emptied before the next."""


class Saver:
    """Saves a run's state and tells callbacks; every method is called on all ranks."""

    def __init__(
        self, checkpoints: Checkpoints, callbacks: Sequence[Callback], *, asynchronous: bool
    ) -> None:
        """Save to `checkpoints`, and wait for each save unless `asynchronous`."""
        self._checkpoints, self._callbacks = checkpoints, callbacks
        self._asynchronous = asynchronous
        self._failed = 0
        self.newest = 0
        """Step whose state was given to a save, or loaded, last."""

    def save(self, step: int, counters: Mapping[str, Any], *, wait: bool = False) -> None:
        """Save the state after `step` unless that was done; a failure is logged.

        Raises:
            SaveFailed: on all ranks, if it failed and was to be waited for, or one too many did.
        """
        self._settle(self._checkpoints.finish, needed=wait and step == self.newest)
        if step != self.newest:
            self._settle(lambda: self._begin(step, counters), needed=wait)
        if wait or not self._asynchronous:
            self._settle(self._checkpoints.finish, needed=wait)

    def poll(self) -> None:
        """Take note of a save that has ended."""
        self._settle(self._checkpoints.poll, needed=False)

    def _begin(self, step: int, counters: Mapping[str, Any]) -> None:
        self._checkpoints.save(step, counters)
        self.newest = step

    def _settle(self, act: Any, *, needed: bool) -> None:
        try:
            path: Path | None = act()
        except SaveFailed as error:
            self.newest, self._failed = -1, self._failed + 1
            if needed or self._failed >= MAX_FAILED:
                raise
            logger.info("%s | training goes on; the next save is tried in its turn", error)
            return
        if path is not None:
            self._failed = 0
            for each in self._callbacks:
                each.saved(step_of(path), path)
