"""Training checkpoints: Megatron's dist_checkpointing, written in the background, then committed.

    OUTPUT/checkpoints/step-00000100/   Megatron's files; model/ and run.yaml: what it is of;
                                        jam.json: step, identity, counters, sizes and checksums

A save forks a process on each rank, which writes what the tensors were at that moment while
training goes on. When all have written, a thread of rank 0 adds the manifest and gives the hidden
folder its name by one rename: a checkpoint is whole or is not there. Megatron's files hold pickles:
a checkpoint is trusted input, unlike a weights folder.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncRequest,
    TemporalAsyncCaller,
)
from torch.distributed.checkpoint import CheckpointException

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import replace_folder, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.parallel.versions import OWN_WRITERS
from megatron_jam.parallel.world import World
from megatron_jam.training.engine import Engine
from megatron_jam.training.manifest import (
    MANIFEST,
    NAME,
    find_damage,
    read_manifest,
    write_manifest,
)
from megatron_jam.training.staging import complete, discard, free_reserve, hashing, stage
from megatron_jam.training.state import bytes_to_write, unshare


class SaveFailed(UsageError):
    """A checkpoint could not be written; raised on all ranks. Older ones are as they were."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay."""

    newest: int
    """How many of the newest."""

    every: int = 0
    """Besides, those after a multiple of so many steps; 0 for none."""

    steps: frozenset[int] = frozenset()
    """Besides, those after these steps."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on."""

    step: int
    """Optimizer steps that it has made."""

    counters: Mapping[str, Any]
    """The loop's own state, as it was given to `save`."""


@dataclass(kw_only=True)
class _Pending:
    step: int
    part: Path
    about: Mapping[str, Any]
    request: AsyncRequest
    writer: TemporalAsyncCaller
    begun: float
    commit: Future[str] | None = None
    """When all have written: why the checkpoint could not get its name, or nothing; on rank 0."""


class Checkpoints:
    """The checkpoints of one run; every method is called on all ranks."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        world: World,
        *,
        identity: Mapping[str, Any],
        keep: Keep,
        describe: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Keep checkpoints in `folder`.

        Args:
            folder: where they are.
            engine: has this rank's share of model and optimizer.
            world: the ranks.
            identity: settings that a run must not change, as plain JSON values.
            keep: which of them stay.
            describe: writes what the run is into a checkpoint's folder, on rank 0.
        """
        self._folder, self._keep = Path(folder), keep
        self._engine, self._world = engine, world
        self._identity, self._describe = dict(identity), describe
        self._pending: _Pending | None = None
        # What nobody need wait for, on rank 0; it has ended before the next save forks.
        self._background = ThreadPoolExecutor(1, "checkpoints")
        self._removal: Future[None] | None = None
        self._is_checked = False

    def save(self, step: int, counters: Mapping[str, Any]) -> None:
        """Begin to save the state after `step` optimizer steps; what is changed afterwards does not
        matter. The save before, if it is still being written, is waited for.

        Raises:
            SaveFailed: this save cannot begin, or the one before has failed.
        """
        self.finish()
        begun = time.perf_counter()
        state = self._engine.sharded_state(is_loading=False)
        unshare(state)
        size = torch.tensor(bytes_to_write(state), device=self._world.device)
        dist.all_reduce(size)
        part = self._stage(step, int(size))
        # Whether the ranks' parts make up the whole does not change from save to save.
        request = dist_checkpointing.save(
            state,
            str(part),
            validate_access_integrity=not self._is_checked,
            async_sharded_save=True,
            **OWN_WRITERS,
        )
        self._is_checked = True
        writer = TemporalAsyncCaller()
        writer.schedule_async_call(hashing(request, part, self._world.rank))
        self._pending = _Pending(
            step=step,
            part=part,
            about={"step": step, "identity": self._identity, "counters": dict(counters)},
            request=request,
            writer=writer,
            begun=begun,
        )

    def poll(self) -> Path | None:
        """Commit the save under way if all ranks have written; its path, once.

        Raises:
            SaveFailed: a rank could not write.
        """
        return self._complete(blocking=False)

    def finish(self) -> Path | None:
        """As `poll`, but wait for the ranks' writers."""
        path = self._complete(blocking=True)
        if self._removal is not None:
            self._removal.result()
        return path

    def _complete(self, *, blocking: bool) -> Path | None:
        pending = self._pending
        if pending is None:
            return None
        path = self._folder / f"step-{pending.step:08d}"
        if pending.commit is None:
            if not pending.writer.is_current_async_call_done(blocking, no_dist=False):
                return None
            self._gather(pending)
            is_first = self._world.rank == 0
            commit = self._background.submit(self._commit, pending, path) if is_first else Future()
            pending.commit = commit
        ended: list[str | None] = [None]
        if self._world.rank == 0 and (blocking or pending.commit.done()):
            ended = [pending.commit.result()]
        dist.broadcast_object_list(ended)
        if ended[0] is None:
            return None
        self._pending = None
        if ended[0]:
            raise SaveFailed(ended[0])
        return path

    def _gather(self, pending: _Pending) -> None:
        """When all have written: rank 0 writes down which rank wrote what."""
        if self._world.rank == 0:
            free_reserve(pending.part)
        try:
            for finalize in pending.request.finalize_fns:
                finalize()
        except CheckpointException as error:
            self._pending = None
            if self._world.rank == 0:
                discard(pending.part)
            raise SaveFailed(f"step {pending.step} was not saved: {_reason(error)}") from error

    def load_latest(self, *, on_damage: str = "stop") -> Resumed:
        """Load the newest checkpoint into the model and optimizer.

        Args:
            on_damage: "stop", or "previous" to put damaged ones aside (as step-N.damaged) and take
                the newest that is whole.

        Returns:
            Where the run goes on; step 0 if there is no checkpoint.

        Raises:
            UsageError: the newest is damaged, which is said file by file, or is of a run with
                another identity; the message names the setting.
        """
        found = [_named_checkpoints(self._folder)]
        dist.broadcast_object_list(found)
        path = self._newest_whole(found[0], on_damage)
        if path is None:
            return Resumed(step=0, counters={})
        manifest = read_manifest(path)
        for name, value in self._identity.items():
            if manifest["identity"].get(name) != value:
                raise UsageError(
                    f"{path} was made with another `{name}`: set it back to go on with that run, or"
                    " choose another output to begin a new one"
                )
        state = self._engine.sharded_state(is_loading=True)
        self._engine.take_state(dist_checkpointing.load(state, str(path)))
        logger.info("resumed from %s", path)
        return Resumed(step=int(manifest["step"]), counters=manifest["counters"])

    def _newest_whole(self, paths: list[Path], on_damage: str) -> Path | None:
        """The newest of `paths`, oldest first, or the newest that is whole."""
        damaged: list[str] = []
        aside: list[Path] = []
        for path in reversed(paths):
            lines = find_damage(path, self._world)
            if not lines:
                break
            damaged += lines
            aside.append(path)
        else:
            path = None
        if not damaged:
            return path
        told = "; ".join(damaged[:3]) + (f"; and {len(damaged) - 3} more" if damaged[3:] else "")
        if on_damage == "stop":
            offer = f"goes on from {path}, the newest whole one" if path else "begins anew"
            raise UsageError(f"damaged checkpoint: {told}. `--on_damage previous` {offer}")
        logger.info("damaged checkpoint: %s. Put aside; taking %s", told, path or "none")
        if self._world.rank == 0:
            for each in aside:
                _put_aside(each)
        dist.barrier()
        return path

    def _stage(self, step: int, size: int) -> Path:
        """A folder to write `size` bytes of tensors to; its name is on rank 0's word."""
        answer: list[Any] = [None, ""]
        if self._world.rank == 0:
            try:
                answer[0] = stage(self._folder, f"step-{step:08d}", size, self._describe)
            except OSError as error:
                answer[1] = f"step {step} was not saved: {error}"
        dist.broadcast_object_list(answer)
        if answer[1]:
            raise SaveFailed(answer[1])
        return answer[0]

    def _commit(self, pending: _Pending, path: Path) -> str:
        """Give a checkpoint that is written its name, in the background; why it has none."""
        try:
            write_manifest(pending.part, pending.about, complete(pending.part))
            if path.exists() and not (path / MANIFEST).is_file():
                _put_aside(path)  # half a checkpoint: it never counted
            replace_folder(pending.part, path, marker=MANIFEST)
        except (OSError, UsageError) as error:
            discard(pending.part)
            return f"step {pending.step} was not saved: {error}"
        logger.info("saved %s, begun %.1f s ago", path, time.perf_counter() - pending.begun)
        self._removal = self._background.submit(self._drop_old)
        return ""

    def _drop_old(self) -> None:
        """Drop what need not stay: hidden at once, gone in a while."""
        for path in complete_checkpoints(self._folder)[: -self._keep.newest]:
            step = step_of(path)
            if step in self._keep.steps or (self._keep.every and step % self._keep.every == 0):
                continue
            if path.name == best_checkpoint(self._folder):
                continue
            hidden = path.with_name(f".{path.name}.old")
            shutil.rmtree(hidden, ignore_errors=True)
            try:
                path.rename(hidden)
            except OSError as error:
                logger.warning("an old checkpoint stays: %s", error)
            # Thousands of gigabytes take a file system long to forget.
            shutil.rmtree(hidden, ignore_errors=True)


BEST = "best"
"""File in a run's folder of checkpoints: the name of one that stays until another is named."""


def best_checkpoint(folder: Path) -> str:
    """Name of the checkpoint marked best, or nothing."""
    path = folder / BEST
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def mark_best(folder: Path, step: int) -> None:
    """Keep the checkpoint after `step`, which may be yet to come, in place of the one before."""
    write_text_atomically(folder / BEST, f"step-{step:08d}\n")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run that have a manifest, oldest first."""
    return [path for path in _named_checkpoints(folder) if (path / MANIFEST).is_file()]


def step_of(path: Path) -> int:
    """Steps that a checkpoint is of, by its name."""
    found = NAME.fullmatch(path.name)
    assert found
    return int(found[1])


def _named_checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name))


def _put_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _reason(error: CheckpointException) -> str:
    """What one of the ranks said, in a line; the first rank alone is told."""
    for rank, (what, _) in error.failures.items():
        return f"rank {rank}: {' '.join(str(what).split())}"
    return "a rank could not write"
