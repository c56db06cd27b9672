"""Which files a checkpoint consists of: tensor-parallel parts, each of one file or FSDP shards."""

import glob
import re
from collections import defaultdict
from pathlib import Path

from megatron_jam.config.errors import UsageError

_NAME = re.compile(r"(?P<stem>.+?)(-model_part-(?P<part>\d+))?(-shard(?P<shard>\d+))?\.pt")


def find_parts(source: str) -> list[list[Path]]:
    """The files of the one checkpoint that a file, a folder or a pattern names.

    Returns:
        For each tensor-parallel part the files of its shards, both in numeric order.

    Raises:
        UsageError: there are none, of several checkpoints, or one between two others is missing.
    """
    places: dict[tuple[int, int], Path] = {}
    marks = set()
    for path, match in _files(source):
        place = (int(match["part"] or 0), int(match["shard"] or 0))
        if place in places:
            raise UsageError(f"{places[place]} and {path} are the same part: name one of them")
        places[place] = path
        marks.add((match["part"] is None, match["shard"] is None))
    if len(marks) > 1:
        some = ", ".join(str(path) for path in sorted(places.values())[:3])
        raise UsageError(f"{source} mixes whole files with parts or shards ({some}): name one kind")
    return _in_order(source, places)


def _files(source: str) -> list[tuple[Path, re.Match[str]]]:
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.pt"))
    else:
        # A file's own name may look like a pattern.
        found = [path] if path.exists() else [Path(each) for each in sorted(glob.glob(source))]
    by_stem = defaultdict(list)
    for each in found:
        if match := _NAME.fullmatch(each.name):
            by_stem[match["stem"]].append((each, match))
    if not by_stem:
        raise UsageError(f"{source}: no checkpoint (*.pt) there")
    if len(by_stem) > 1:
        folder = glob.escape(str(path)) if path.is_dir() else str(path.parent)
        raise UsageError(
            f"{source} holds several checkpoints ({', '.join(sorted(by_stem))}): name one, as"
            f" '{Path(folder) / glob.escape(min(by_stem))}*.pt'"
        )
    (files,) = by_stem.values()
    return files


def _in_order(source: str, places: dict[tuple[int, int], Path]) -> list[list[Path]]:
    parts, shards = (1 + max(place[axis] for place in places) for axis in (0, 1))
    due = [(part, shard) for part in range(parts) for shard in range(shards)]
    if missing := [place for place in due if place not in places]:
        part, shard = missing[0]
        raise UsageError(
            f"{source}: of {len(due)} files {len(missing)} are missing, the first that of model"
            f" part {part}, shard {shard}: copy the whole checkpoint"
        )
    return [[places[part, shard] for shard in range(shards)] for part in range(parts)]
