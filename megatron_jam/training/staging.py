"""The hidden folder that a checkpoint is written to, until it is whole."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.serialization import set_crc32_options

from megatron_jam.config.files import write_text_atomically
from megatron_jam.training.manifest import file_sha256

_SPARE = 64 << 20
"""Bytes that are to be free besides the tensors': Megatron's lists, the run's description."""

_RESERVE, _RESERVE_BYTES = ".reserve", 8 << 20
_HASHES = ".hashes-{}.json"


def stage(folder: Path, name: str, size: int, describe: Callable[[Path], None]) -> Path:
    """Make a folder for checkpoint `name` of `size` bytes of tensors.

    Its name is of this attempt alone: what a killed run's writers still write goes elsewhere.

    Raises:
        OSError: there is too little room, by the file system's word or by a quota.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob(".step-*.part"), *folder.glob(".step-*.about")):
        shutil.rmtree(old, ignore_errors=True)
    free, wanted = shutil.disk_usage(folder).free, size + size // 50 + _SPARE
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"{wanted / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            str(folder),
        )
    part = folder / f".{name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    # Apart from it, as Megatron takes a folder with files for a spoilt checkpoint.
    about = _about(part)
    about.mkdir()
    try:
        _reserve(about)
        describe(about)
    except OSError:
        discard(part)
        raise
    return part


def complete(part: Path) -> dict[str, str]:
    """Add the description to a folder that all writers have left; the checksums that they took."""
    for path in _about(part).iterdir():
        path.rename(part / path.name)
    _about(part).rmdir()
    found: dict[str, str] = {}
    for path in part.glob(_HASHES.format("*")):
        found |= json.loads(path.read_text())
        path.unlink()
    return found


def discard(part: Path) -> None:
    """Drop a folder that does not become a checkpoint."""
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(_about(part), ignore_errors=True)


def free_reserve(part: Path) -> None:
    """Give back what `stage` took, when all tensors are written."""
    (_about(part) / _RESERVE).unlink(missing_ok=True)


def hashing(request: AsyncRequest, part: Path, rank: int) -> AsyncRequest:
    """The request, whose writer also leaves checksums of its files, while they are in memory."""
    if request.async_fn is None:
        return request
    return request._replace(async_fn=_WriteAndHash(request.async_fn, part, rank))


class _WriteAndHash:
    """What a forked process of a rank runs."""

    def __init__(self, write: Callable[..., None], part: Path, rank: int) -> None:
        self._write, self._part, self._rank = write, part, rank

    def __call__(self, rank: int, buckets: Sequence[Any], results: Any) -> None:
        set_crc32_options(False)  # a second checksum of every byte, which nothing reads
        self._write(rank, buckets, results)
        written = [path for bucket in buckets if (path := Path(bucket[0])).is_file()]
        with ThreadPoolExecutor(len(buckets)) as threads:
            found = threads.map(file_sha256, written)
        hashes = {path.name: each for path, each in zip(written, found, strict=True)}
        write_text_atomically(self._part / _HASHES.format(self._rank), json.dumps(hashes))


def _reserve(folder: Path) -> None:
    """Take room for what is written last. A quota shows when one writes."""
    with (folder / _RESERVE).open("wb") as file:
        file.write(bytes(_RESERVE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _about(part: Path) -> Path:
    """Where the description waits."""
    return part.with_suffix(".about")
