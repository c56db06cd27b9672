"""A pool of worker processes, started once, in which tests run functions on real gloo ranks.

Between layouts the default group is destroyed and initialised again on a new prefix of one store,
which this process serves: Megatron's groups are not freed by its own destroy function alone.
"""

import atexit
import contextlib
import gc
import itertools
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.device import select_device
from megatron_jam.parallel.world import World, build_world, stop_world
from tests.helpers.forks import CONTEXT

HOST = "127.0.0.1"
MAX_WORKERS = 8
TIMEOUT_SECONDS = 240
GRACE_SECONDS = 10


class WorkerPool:
    """Runs `function(world, *args)` on the first n workers and returns the n results by rank."""

    def __init__(self) -> None:
        self._runs = itertools.count()
        # Of a store in a file each run would read all that earlier ones have left there.
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        # Not daemons, as a checkpoint's save starts a process of its own; so end them for certain.
        atexit.register(self.close)

    def _grow(self, ranks: int) -> None:
        """Start workers up to `ranks`: each takes seconds and memory, and few tests need all."""
        assert ranks <= MAX_WORKERS, f"{ranks} ranks; the pool has {MAX_WORKERS} at most"
        started = len(self._processes)
        for rank in range(started, ranks):
            mine, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(theirs, self._store.port, rank))
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)
        for pipe in self._pipes[started:]:
            pipe.recv()

    def run(
        self, function: Callable[..., Any], parallel: ParallelConfig, *args: Any, data: int = 1
    ) -> list[Any]:
        """Call `function(world, *args)` on tensor x pipeline x context x `data` ranks."""
        ranks = parallel.tensor * parallel.pipeline * parallel.context * data
        self._grow(ranks)
        prefix = f"run{next(self._runs)}"
        for pipe in self._pipes[:ranks]:
            pipe.send((function, parallel, args, ranks, prefix))
        answers = self._collect(self._pipes[:ranks])
        errors = [value for ok, value in answers if not ok]
        if len(answers) < ranks:
            self.close()  # the rest wait for ever
            errors.append(f"{ranks - len(answers)} of {ranks} ranks have not answered")
        if errors:
            raise RuntimeError("a worker failed:\n" + "\n".join(errors))
        return [value for _, value in answers]

    def _collect(self, pipes: list[Connection]) -> list[tuple[bool, Any]]:
        """What ranks answer in time, in their order: little after the first that failed."""
        answers: dict[Connection, tuple[bool, Any]] = {}
        end = time.monotonic() + TIMEOUT_SECONDS
        while waiting := [pipe for pipe in pipes if pipe not in answers]:
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    answers[pipe] = (False, "a rank's process has ended")
                if not answers[pipe][0]:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        return [answers[pipe] for pipe in pipes if pipe in answers]

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(None)
                process.join(2)
                process.kill()
        self._pipes, self._processes = [], []


def _work(pipe: Connection, port: int, rank: int) -> None:
    logger.setLevel("ERROR")
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # most of Megatron's groups are never used
    store = dist.TCPStore(HOST, port, wait_for_workers=False)
    torch.set_num_threads(1)
    device = select_device()
    gc.freeze()  # modules stay: a collection need not look at them
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        function, parallel, args, ranks, prefix = job
        try:
            _join(store, prefix, rank, ranks)
            world: World = build_world(parallel, device)
            pipe.send((True, function(world, *args)))
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
        finally:
            # Models that wait for the collector hold their groups, with the groups' threads.
            gc.collect()
            stop_world()
    os._exit(0)  # taking an interpreter with torch and Megatron down takes seconds


def _join(store: dist.Store, prefix: str, rank: int, ranks: int) -> None:
    own = dist.PrefixStore(prefix, store)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=own, rank=rank, world_size=ranks, timeout=timeout)
