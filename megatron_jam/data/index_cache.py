"""Arrays that take long to make, once on disk for all ranks of a node and for later starts."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.files import publish
from megatron_jam.config.log import logger


class IndexCache:
    """Files named by a hash of what they are made from, memory-mapped.

    No rank waits for another: one that does not find a file makes it under a name of its own and
    renames it into place, whole. So it does not matter whether nodes share the folder.
    """

    def __init__(self, folder: Path | str | None) -> None:
        """Keep files in `folder`, which is made if needed; None keeps nothing."""
        self._folder = None if folder is None else Path(folder)

    def digest(self, *inputs: NDArray) -> str:
        """A hash of arrays that others are made from; empty where nothing is kept."""
        if self._folder is None:
            return ""
        sha256 = hashlib.sha256()
        for each in inputs:
            sha256.update(f"{each.dtype.str} {each.shape}".encode())
            sha256.update(np.ascontiguousarray(each).data)
        return sha256.hexdigest()

    def arrays(
        self, key: Sequence[object], names: Sequence[str], build: Callable[[], Sequence[NDArray]]
    ) -> list[NDArray]:
        """The arrays that `build` returns, called `names`, which `key` determines."""
        if self._folder is None:
            return list(build())
        name = hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:32]
        paths = [self._folder / f"{name}.{each}.npy" for each in names]
        if not all(path.is_file() for path in paths):
            arrays = list(build())
            try:
                for path, array in zip(paths, arrays, strict=True):
                    _write(path, array)
            except OSError as error:  # a cache's disk may be full or read-only; the run goes on
                logger.warning("%s is not used as a cache: %s", self._folder, error)
                return arrays
        return [np.asarray(np.load(path, mmap_mode="r")) for path in paths]


def _write(path: Path, array: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.save(stream, array)
        publish(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
