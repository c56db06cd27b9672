"""A preparing run: readers, workers and writer, in the order of the input.

Chunks of records go to worker processes; what comes back is written in the order in which it was
read, so that the number of workers, and when a run was stopped, leave no trace in the output.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, temporary_name
from megatron_jam.config.log import logger
from megatron_jam.data.indexed import SetInfo, SetWriter, by_modality, write_info
from megatron_jam.data.prepare.files import Part
from megatron_jam.data.prepare.held_out import TRAINING
from megatron_jam.data.prepare.job import Job
from megatron_jam.data.prepare.readers import expand, read_part, shard_of
from megatron_jam.data.prepare.records import BadRecord, Chunk, Rejected
from megatron_jam.data.prepare.writing import (
    Journal,
    Place,
    Prepared,
    copy_documents,
    write_side_table,
)

OnBad = Literal["stop", "skip"]


class Shard(NamedTuple):
    """One of `count` equal parts of the work."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> "Shard | None":
        """Read "i/n", with i from 0 to n - 1, as SLURM_ARRAY_TASK_ID counts."""
        if text is None:
            return None
        number, slash, count = text.partition("/")
        if slash and number.isdecimal() and count.isdecimal() and int(number) < int(count):
            return cls(int(number), int(count))
        raise UsageError(f"shard is {text!r}: write i/n, with i from 0 to n - 1, such as 0/8")

    def prefix_of(self, prefix: str) -> str:
        """Where this shard of the set PREFIX is written."""
        return f"{prefix}-{self.number:05d}-of-{self.count:05d}"


def slice_prefix(prefix: str, name: str) -> str:
    """PREFIX of the training set, PREFIX_NAME of a slice that is held out."""
    return f"{prefix}_{name}" if name != TRAINING else prefix


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of a preparing tool."""

    inputs: Sequence[str] | str
    """Files, folders with a table, or patterns."""

    prefix: str
    """Path of the set, without an ending."""

    shard: Shard | None = None
    """Which part of the input this run has; None for all of it."""

    workers: int | None = None
    """Processes; None for as many as there are cores."""

    bad: OnBad = "stop"
    """What a record that cannot be used does: it ends the run, or is listed and left out."""

    def prepare(self, job: Job) -> None:
        """Write the set, and the slices that are held out, as `job` makes them.

        Raises:
            UsageError: an input is missing, nothing is left to write, or a record is bad.
        """
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, not {self.workers}")
        parts = self._parts()
        slices = [TRAINING, *job.slices]
        with Journal(self.prefix_of(TRAINING), slices, self._identity(job)) as journal:
            todo = _chunks(parts, journal.place, job.num_records)
            with _Workers(job, self.workers or len(os.sched_getaffinity(0))) as workers:
                for prepared, place in workers.ordered(todo):
                    if self.bad == "stop" and prepared.bad:
                        raise BadRecord(*prepared.bad[0])
                    journal.add(prepared, place)
            journal.commit()
            self._publish(job, journal)

    def files(self) -> list[Path]:
        """The input files, in order."""
        return expand([self.inputs] if isinstance(self.inputs, str) else self.inputs)

    def prefix_of(self, name: str = TRAINING) -> str:
        """PREFIX of what this run writes of slice `name`."""
        prefix = slice_prefix(self.prefix, name)
        return self.shard.prefix_of(prefix) if self.shard else prefix

    def chunks(self, job: Job) -> Iterator[Chunk]:
        """What this run reads, in order, but for files that cannot be read."""
        todo = _chunks(self._parts(), Place(0, None), job.num_records)
        return (what for what, _ in todo if not isinstance(what, Rejected))

    def _parts(self) -> list[Part]:
        return shard_of(self.files(), self.shard or Shard(0, 1))

    def _identity(self, job: Job) -> dict[str, Any]:
        """What must be the same for a run to go on with another's work."""
        found = [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
            for path in self.files()
        ]
        return {
            "files": found,
            "shard": self.shard,
            "vocabulary": job.vocabulary.sha256,
            "described": job.described(),
            "settings": job.settings(),
        }

    def _settings(self, job: Job) -> dict[str, Any]:
        """What sets must agree in to be merged; shards, in what they are shards of, too."""
        if not self.shard:
            return job.settings()
        files = [[path.name, path.stat().st_size] for path in self.files()]
        return job.settings() | {"shards": self.shard.count, "inputs": files}

    def _publish(self, job: Job, journal: Journal) -> None:
        # The training set last, and an older one gone: where it is, all are.
        Path(f"{self.prefix_of(TRAINING)}.json").unlink(missing_ok=True)
        self._publish_rejected(journal)
        for name in (*job.slices, TRAINING):
            prefix = self.prefix_of(name)
            Path(f"{prefix}.json").unlink(missing_ok=True)
            if journal.path(name, "tokens").stat().st_size:
                write_side_table(journal.path(name, "rows"), Path(f"{prefix}.parquet"))
                described = self._described(job)
                with SetWriter(prefix, vocabulary=job.vocabulary, **described) as writer:
                    copy_documents(journal, name, writer, job.dtype)
                    writer.finish()
            elif name == TRAINING and not self.shard:
                raise UsageError(f"{prefix}: there is no document to write")
            else:
                self._publish_nothing(job, prefix)
        journal.remove()

    def _publish_rejected(self, journal: Journal) -> None:
        rejected = Path(f"{self.prefix_of(TRAINING)}.rejected.jsonl")
        rejected.unlink(missing_ok=True)
        if (journal.folder / "rejected").stat().st_size:
            copy = temporary_name(rejected)
            shutil.copyfile(journal.folder / "rejected", copy)
            publish(copy, rejected)
            logger.warning("%s lists what was left out: %d bad records", rejected, journal.num_bad)

    def _described(self, job: Job) -> dict[str, Any]:
        return {**job.described(), "settings": self._settings(job)}

    def _publish_nothing(self, job: Job, prefix: str) -> None:
        """A shard or slice without documents says so, else it would seem to be missing."""
        for ending in ("bin", "idx", "parquet"):
            Path(f"{prefix}.{ending}").unlink(missing_ok=True)
        info = SetInfo(
            vocabulary_sha256=job.vocabulary.sha256,
            **self._described(job),
            num_documents=0,
            num_tokens=0,
            tokens_by_modality=by_modality(np.zeros(3, dtype=np.int64)),
            sha256={},
        )
        write_info(prefix, info)


def _chunks(
    parts: Sequence[Part], begin: Place, num_records: int
) -> Iterator[tuple[Chunk | Rejected, Place]]:
    """What is to be read from `begin` on, each with the place behind it."""
    for number, part in enumerate(parts):
        if number < begin.part:
            continue
        position = begin.position if number == begin.part else None
        try:
            for chunk, behind in read_part(part, position, num_records=num_records):
                yield chunk, Place(number, behind)
        except BadRecord as error:  # the rest of this file cannot be read
            yield error.rejected, Place(number + 1, None)


class _Workers:
    """Processes that work on chunks, and the order in which these come back."""

    def __init__(self, job: Job, count: int) -> None:
        self._job = job
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Workers":
        if self._count > 1:
            # Forked, workers have what was loaded; torch computes on one thread in each.
            self._pool = ProcessPoolExecutor(
                self._count,
                mp_context=multiprocessing.get_context("fork"),
                initializer=_begin_worker,
                initargs=(self._job, os.getpid()),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def ordered(
        self, todo: Iterator[tuple[Chunk | Rejected, Place]]
    ) -> Iterator[tuple[Prepared, Place]]:
        """What becomes of each chunk; a few of them are under way at a time."""
        under_way: deque[tuple[Callable[[], Any], Place]] = deque()
        for what, place in todo:
            under_way.append((self._begin(what), place))
            if len(under_way) > 2 * self._count * bool(self._pool):
                yield self._end(*under_way.popleft())
        while under_way:
            yield self._end(*under_way.popleft())

    def _begin(self, what: Chunk | Rejected) -> Callable[[], Any]:
        if isinstance(what, Rejected):
            return lambda: Prepared({}, [what])
        if self._pool is None:
            return lambda: work(self._job, what)
        return self._pool.submit(_work, what).result

    def _end(self, result: Callable[[], Any], place: Place) -> tuple[Prepared, Place]:
        try:
            done = result()
        except BrokenProcessPool as error:
            raise UsageError(
                "a worker process was killed, most likely as memory ran out: take fewer --workers; "
                "run it again, and it goes on where it was"
            ) from error
        if self._job.finishes_in_one_process and not isinstance(done, Prepared):
            done = self._job.finish(done)
        return done, place


def work(job: Job, chunk: Chunk) -> Any:
    """What a worker does with a chunk."""
    read = job.read(chunk)
    return read if job.finishes_in_one_process else job.finish(read)


_worker_job: Job


def _begin_worker(job: Job, parent: int) -> None:
    global _worker_job
    _worker_job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Linux ends this process with the one that began it, even when that was killed.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(chunk: Chunk) -> Any:
    return work(_worker_job, chunk)
