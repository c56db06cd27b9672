"""From the files of a checkpoint to its whole tensors: FSDP shards undone, parts merged."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.weights.lazy import Lazy, empty, joined, rows, same
from megatron_jam.weights.metaseq.pickles import TorchFile, plain

_ROWS = re.compile(
    r".*(embed_tokens|output_projection|fc1|[qkv]_proj|activation_fn\.gate)\.(weight|bias)"
)
_COLUMNS = re.compile(r".*(out_proj|fc2)\.weight")
_PACKED = re.compile(r"(.*)\bqkv_proj\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A whole tensor of a checkpoint."""

    key: str
    """Its name there; of a packed projection the name that its third would have."""

    source: str
    """The key that the files have it under."""

    action: str
    """What was done to have it whole."""

    tensor: Lazy
    """The tensor."""


def read_parts(parts: Sequence[Sequence[Path]]) -> tuple[dict[str, Any], list[Whole]]:
    """Settings (`cfg`, or `args` of old files) and whole tensors of a checkpoint.

    Raises:
        UsageError: files do not fit each other, or cannot be read; the message names them.
    """
    read = [[TorchFile(path) for path in shards] for shards in parts]
    for file in (file for shards in read for file in shards):
        if not isinstance(file.values, dict) or not isinstance(file.values.get("model"), dict):
            raise UsageError(f"{file.path} holds no `model`: it is no checkpoint of metaseq")
        _check_model(file.path, file.values["model"])
    first = read[0][0]
    for file in (file for shards in read for file in shards):
        if (own := _updates(file)) != (other := _updates(first)):
            raise UsageError(
                f"{first.path} was saved after {other} updates and {file.path} after {own}: they"
                " are not of one checkpoint"
            )
    settings = _settings(first)
    tensors = [_whole_part(shards) for shards in read]
    for shards, held in zip(read, tensors, strict=True):
        if held.keys() != tensors[0].keys():
            (key, *_) = sorted(held.keys() ^ tensors[0].keys())
            raise UsageError(f"{first.path} and {shards[0].path} differ in having {key}")
    names = [str(shards[0].path) for shards in read]
    wholes = []
    for key in tensors[0]:
        wholes += _merge(key, [held[key] for held in tensors], names)
    return settings, wholes


def _check_model(path: Path, model: Mapping[Any, Any]) -> None:
    """Raise UsageError if `model` holds anything but tensors by name."""
    for key, value in model.items():
        if not isinstance(key, str):
            raise UsageError(f"{path}: `model` has the key {key!r}, no name: save it without that")
        if not isinstance(value, Lazy):
            what = type(value).__name__
            raise UsageError(f"{path}: {key} is a {what}, no tensor: save it without that")
        if not value.shape:
            raise UsageError(
                f"{path}: {key} is one number, which no weight is: save it without that"
            )


def _settings(file: TorchFile) -> dict[str, Any]:
    try:
        found = plain(file.values.get("cfg") or {"model": file.values.get("args") or {}})
    except (RecursionError, ValueError):
        raise UsageError(
            f"{file.path}: its settings are nested without end, or over a million"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("model") or {}, dict):
        raise UsageError(
            f"{file.path}: its settings (cfg, and model in it) are no values by name: take the file"
            " as metaseq saved it"
        )
    return found


def _updates(file: TorchFile) -> int | None:
    """How many optimizer steps a file was saved after, if it says so."""
    history = file.values.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    number = last.get("num_updates") if isinstance(last, dict) else None
    return number if isinstance(number, int) else None


def _whole_part(shards: Sequence[TorchFile]) -> dict[str, Lazy]:
    try:
        return _part(shards)
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UsageError(
            f"{shards[0].path}: its shard_metadata is not what FSDP writes"
            f" ({type(error).__name__}: {error})"
        ) from error


def _part(shards: Sequence[TorchFile]) -> dict[str, Lazy]:
    """Tensors of one tensor-parallel part."""
    # metaseq's own script for other numbers of shards leaves it empty beside whole tensors.
    is_flat = [bool(file.values.get("shard_metadata")) for file in shards]
    if not all(is_flat):
        if len(shards) > 1:
            raise UsageError(f"{shards[is_flat.index(False)].path} has no shard_metadata")
        return dict(shards[0].values["model"])
    for file in shards:
        if other := sorted(file.values["model"].keys() ^ shards[0].values["model"].keys()):
            raise UsageError(f"{shards[0].path} and {file.path} differ in having {other[0]}")
    tensors: dict[str, Lazy] = {}
    flat: set[str] = set()
    for number, entry in enumerate(shards[0].values["shard_metadata"]["param_metadata"]):
        path = str(entry["fsdp_path"])
        for flat_name, held in entry["params"].items():
            key = _under(path, flat_name)
            flat.add(key)
            pieces = [_piece(file, number, flat_name, key) for file in shards]
            _check_alike(key, pieces, [str(file.path) for file in shards], 0)
            _add(tensors, _unflatten(shards[0].path, path, held, pieces), shards[0].path)
    buffers = shards[0].values["model"]
    beside = ((key, tensor) for key, tensor in buffers.items() if key not in flat)
    _add(tensors, beside, shards[0].path)
    for entry in shards[0].values["shard_metadata"]["param_metadata"]:
        for kept, copy in entry.get("shared_param_info") or ():
            if tensors.setdefault(str(copy), tensors[str(kept)]) is not tensors[str(kept)]:
                raise UsageError(f"{shards[0].path} gives {copy} twice")
    return tensors


def _add(tensors: dict[str, Lazy], found: Iterable[tuple[str, Lazy]], path: Path) -> None:
    for name, tensor in found:
        if name in tensors:
            raise UsageError(f"{path} gives {name} twice")
        tensors[name] = tensor


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _piece(file: TorchFile, number: int, flat_name: str, key: str) -> Lazy:
    """A shard's stretch of a flat vector, without the padding at its end."""
    try:
        padding = file.values["shard_metadata"]["param_metadata"][number]["params"][flat_name][
            "padding"
        ]
        whole = file.values["model"][key]
    except (KeyError, IndexError) as error:
        raise UsageError(f"{file.path} lacks {key}, which the first shard has") from error
    return rows(whole, 0, whole.shape[0] - int(padding))


def _unflatten(
    path: Path, room: str, held: Mapping[str, Any], pieces: Sequence[Lazy]
) -> Iterator[tuple[str, Lazy]]:
    """The tensors that lie one after the other in a flat vector of several pieces."""
    numels, length = list(held["numels"]), sum(piece.shape[0] for piece in pieces)
    if sum(numels) != length:
        raise UsageError(
            f"{path} and the {len(pieces) - 1} other shards of its part hold {length:,} numbers of"
            f" {room or 'the model'}, but {sum(numels):,} are due: a shard is missing"
        )
    starts = [0, *accumulate(numels)]
    for name, shape, start, count in zip(
        held["names"], held["shapes"], starts[:-1], numels, strict=True
    ):
        shape = tuple(map(int, shape))
        if math.prod(shape) != count or not shape:
            raise UsageError(
                f"{path}: {name} has shape {shape}, but {count} numbers: copy it again"
            )
        tensor = Lazy(
            shape=shape,
            dtype=pieces[0].dtype,
            read=partial(_stretch, pieces, start, start + count, shape),
            cut=partial(_stretch_rows, pieces, start, shape),
        )
        yield _under(room, str(name)), tensor


def _stretch(pieces: Sequence[Lazy], start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers start .. stop - 1 of several pieces in a row."""
    found, offset = [], 0
    for piece in pieces:
        low, high = max(start - offset, 0), min(stop - offset, piece.shape[0])
        if low < high:
            found.append(rows(piece, low, high).read())
        offset += piece.shape[0]
    if len(found) == 1:
        return found[0].view(shape)
    return torch.cat(found, out=empty((stop - start,), found[0].dtype)).view(shape)


def _stretch_rows(
    pieces: Sequence[Lazy], offset: int, shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Rows start .. stop - 1 of what begins at number `offset` of several pieces in a row."""
    row = math.prod(shape[1:])
    own = (stop - start, *shape[1:])
    return _stretch(pieces, offset + start * row, offset + stop * row, own)


def _merge(key: str, parts: Sequence[Lazy], names: Sequence[str]) -> list[Whole]:
    """One tensor of all parts; of packed keys, values and queries three."""
    count = len(parts)
    joins = 0 if _ROWS.fullmatch(key) or _PACKED.fullmatch(key) else None
    _check_alike(key, parts, names, 1 if _COLUMNS.fullmatch(key) else joins)
    if packed := _PACKED.fullmatch(key):
        if any(part.shape[0] % 3 for part in parts):
            raise UsageError(f"{names[0]} holds {key} as {_form(parts[0])}: its rows are no thirds")
        # Each part stacks its own rows of k, v and q, in this order.
        return [
            Whole(
                key=f"{packed[1]}{letter}_proj.{packed[2]}",
                source=key,
                action=f"take {letter}" + (f" of {count} parts" if count > 1 else ""),
                tensor=joined([_third(part, place) for part in parts], 0),
            )
            for place, letter in enumerate("kvq")
        ]
    for names_of, dim, what in ((_ROWS, 0, "rows"), (_COLUMNS, 1, "columns")):
        if count > 1 and names_of.fullmatch(key):
            action, tensor = f"join {what} of {count} parts", joined(parts, dim)
            return [Whole(key=key, source=key, action=action, tensor=tensor)]
    copied = parts[0]
    if count > 1:
        read = partial(_shared, key, parts, names)
        copied = Lazy(shape=copied.shape, dtype=copied.dtype, read=read)
    return [Whole(key=key, source=key, action="copy", tensor=copied)]


def _check_alike(key: str, parts: Sequence[Lazy], names: Sequence[str], joins: int | None) -> None:
    """Raise UsageError unless parts have one dtype and one shape, but for the dimension along which
    they join."""
    first = parts[0]
    if joins is not None and len(first.shape) <= joins:
        raise UsageError(
            f"{names[0]} holds {key} as {list(first.shape)}, of too few dimensions: it is no weight"
            " of metaseq, or is damaged"
        )
    for part, name in zip(parts, names, strict=True):
        pairs = list(enumerate(zip(part.shape, first.shape, strict=False)))
        alike = all(a == b for dim, (a, b) in pairs if dim != joins)
        if len(part.shape) != len(first.shape) or part.dtype != first.dtype or not alike:
            raise UsageError(
                f"{names[0]} and {name} hold {key} as {_form(first)} and {_form(part)}: they are"
                " not parts of one checkpoint"
            )


def _form(of: Lazy) -> str:
    return f"{str(of.dtype).removeprefix('torch.')} {list(of.shape)}"


def _third(packed: Lazy, place: int) -> Lazy:
    third = packed.shape[0] // 3
    return rows(packed, place * third, (place + 1) * third)


def _shared(key: str, parts: Sequence[Lazy], names: Sequence[str]) -> Tensor:
    """The tensor that all parts hold alike; UsageError if they do not."""
    for part, name in zip(parts[1:], names[1:], strict=True):
        if not same(parts[0], part):
            raise UsageError(f"{names[0]} and {name} differ in {key}, which all parts share")
    return parts[0].read()
