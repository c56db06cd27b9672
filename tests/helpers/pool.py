"""A pool of worker processes, started once, in which tests run functions on real gloo ranks.

Between layouts the default group is destroyed and initialised again on a new prefix of one store:
Megatron's groups are not freed by its own destroy function alone.
"""

import atexit
import contextlib
import gc
import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.device import select_device
from megatron_jam.parallel.world import World, build_world, stop_world

MAX_WORKERS = 8
TIMEOUT_SECONDS = 240


class WorkerPool:
    """Runs `function(world, *args)` on the first n workers and returns the n results by rank."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._runs = itertools.count()
        self._store = os.path.join(tempfile.mkdtemp(prefix="megatron_jam_pool_"), "store")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        # Not daemons, as a checkpoint's save starts a process of its own; so end them for certain.
        atexit.register(self.close)

    def _grow(self, ranks: int) -> None:
        """Start workers up to `ranks`: each takes seconds and memory, and few tests need all."""
        assert ranks <= MAX_WORKERS, f"{ranks} ranks; the pool has {MAX_WORKERS} at most"
        started = len(self._processes)
        for rank in range(started, ranks):
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self._store, rank))
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)
        for pipe in self._pipes[started:]:
            pipe.recv()  # importing torch and Megatron takes seconds, on a busy machine minutes

    def run(
        self, function: Callable[..., Any], parallel: ParallelConfig, *args: Any, data: int = 1
    ) -> list[Any]:
        """Call `function(world, *args)` on tensor x pipeline x context x `data` ranks."""
        ranks = parallel.tensor * parallel.pipeline * parallel.context * data
        self._grow(ranks)
        prefix = f"run{next(self._runs)}"
        for pipe in self._pipes[:ranks]:
            pipe.send((function, parallel, args, ranks, prefix))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes[:ranks]):
            if not pipe.poll(TIMEOUT_SECONDS):
                raise TimeoutError(f"rank {rank} of {ranks} has not answered")
            ok, value = pipe.recv()
            (results if ok else errors).append(value)
        if errors:
            raise RuntimeError("a worker failed:\n" + "\n".join(errors))
        return results

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(None)
                process.join(10)
                process.kill()
        self._pipes, self._processes = [], []


def _work(pipe: Connection, store_path: str, rank: int) -> None:
    logger.setLevel("ERROR")
    torch.set_num_threads(1)
    device = select_device()
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        function, parallel, args, ranks, prefix = job
        try:
            _join(store_path, prefix, rank, ranks)
            world: World = build_world(parallel, device)
            pipe.send((True, function(world, *args)))
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
        finally:
            # Models that wait for the collector hold their groups, with the groups' threads.
            gc.collect()
            stop_world()
    os._exit(0)  # taking an interpreter with torch and Megatron down takes seconds


def _join(store_path: str, prefix: str, rank: int, ranks: int) -> None:
    store = dist.PrefixStore(prefix, dist.FileStore(store_path, -1))
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
