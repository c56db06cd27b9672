"""Settings and fixtures of every test: one thread a process, one pool of gloo ranks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.pool import WorkerPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """The workers on which every distributed test runs."""
    workers = WorkerPool()
    yield workers
    workers.close()
