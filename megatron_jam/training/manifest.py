"""What a checkpoint consists of: sizes and checksums of its files, and what it is of.

The manifest, jam.json, is written last: a folder that has none is no checkpoint.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, write_text_atomically
from megatron_jam.parallel.world import World

MANIFEST = "jam.json"
NAME = re.compile(r"step-(\d{8})")
"""What a checkpoint's folder is called in its run."""
_PIECE = 1 << 22
_KEYS = {"step", "identity", "counters", "files", "sha256"}


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def write_manifest(folder: Path, about: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Write the manifest of a folder that is otherwise whole.

    Args:
        folder: the checkpoint.
        about: its step, identity and counters, as plain JSON values.
        hashes: of files that are known already, by name; the others are read.
    """
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashes.get(name) or file_sha256(folder / name),
        }
        for name in _files(folder)
    }
    values = {**about, "files": files}
    values["sha256"] = _digest(values)
    write_text_atomically(folder / MANIFEST, json.dumps(values, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, whose own checksum fits.

    Raises:
        UsageError: it is missing or damaged; the message says how.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{path} is missing: the folder is half a checkpoint")
    values = read_json(path)
    if not values.keys() >= _KEYS or values["sha256"] != _digest(values):
        raise UsageError(f"{path} is damaged: its own checksum does not fit")
    return values


def find_damage(folder: Path, world: World | None = None) -> list[str]:
    """What is wrong with a checkpoint, a line for each file; the ranks of `world` share the reading
    and get the same answer."""
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    try:
        manifest = read_manifest(folder)
        listed, found = manifest["files"], []
        if rank == 0:
            name = NAME.fullmatch(folder.name)
            if name and int(name[1]) != manifest["step"]:
                found.append(f"{folder} holds the checkpoint of step {manifest['step']}")
            strangers = sorted(set(_files(folder)) - listed.keys())
            found += [f"{folder / name} is not in the manifest" for name in strangers]
        # Large files next to each other would else fall to one rank.
        by_size = sorted(listed, key=lambda name: (-listed[name]["bytes"], name))
        for name in by_size[rank::size]:
            found += _damage_of_file(folder / name, **listed[name])
    except (UsageError, OSError) as error:
        found = [str(error)]
    if world is None:
        return found
    everywhere: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(everywhere, found)
    return sorted({line for each in everywhere for line in each})


def _damage_of_file(path: Path, *, bytes: int, sha256: str) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    size = path.stat().st_size
    if size != bytes:
        return [f"{path} has {size} bytes of {bytes}"]
    if file_sha256(path) != sha256:
        return [f"{path} has other bytes than were written"]
    return []


def _files(folder: Path) -> list[str]:
    """Names of all files but the manifest, relative to `folder`, hidden ones included."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(each) for each in found if str(each) != MANIFEST)


def _digest(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
