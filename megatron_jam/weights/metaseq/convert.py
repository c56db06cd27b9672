"""A checkpoint of metaseq, read and planned."""

from collections.abc import Container, Iterable
from pathlib import Path

import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import Unchanged
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.weights.conversion import Conversion, Step, fitted
from megatron_jam.weights.ids import read_ids
from megatron_jam.weights.lazy import Lazy, zeros
from megatron_jam.weights.metaseq.files import find_parts
from megatron_jam.weights.metaseq.merge import Whole, read_parts
from megatron_jam.weights.metaseq.names import canonical_name, model_config, why_dropped

PADDED_TO = 8
"""metaseq pads its vocabulary to a multiple of this, for each tensor-parallel part."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights may be."""


def read_metaseq(
    source: str, tokenizer: Path, *, num_heads: int = 0, activation: str = "", every: int = 0
) -> Conversion:
    """Read all but the tensors of a checkpoint, and plan its conversion.

    Args:
        source: a file, a folder or a pattern of files.
        tokenizer: folder with the checkpoint's tokenizer.json and vocabulary.json; the latter may
            be missing where tokens are named as CM3leon's.
        num_heads: in place of what the checkpoint says; 0 takes that.
        activation: likewise; "" takes that.
        every: after each how many layers bridges stand, where their number fits several; 0 takes
            the only one that fits.

    Raises:
        UsageError: the checkpoint is not whole, or is no model that towers here can compute.
    """
    # Where both are missing, the tokenizer was looked for beside the checkpoint.
    parts = find_parts(source)
    ids = read_ids(tokenizer)
    files = [path for shards in parts for path in shards]
    unchanged = Unchanged(files)
    settings, wholes = read_parts(parts)
    _check_parts(source, len(parts), wholes)
    config = model_config(
        settings,
        {whole.key: whole.tensor for whole in wholes},
        vocab_size=ids.vocabulary.size,
        num_heads=num_heads,
        activation=activation,
        every=every,
    )
    table = {entry.name: entry for entry in parameter_table(config)}
    names = _targets(wholes, config, table)
    steps: list[Step] = []
    tensors: dict[str, Lazy] = {}
    first: Whole | None = None
    for whole in wholes:
        shape = whole.tensor.shape
        if reason := why_dropped(whole.key, config):
            steps.append(Step(source=whole.source, shape=shape, action=f"drop: {reason}"))
            continue
        name = names[whole.key]
        _check_kind(whole, table[name])
        tensors[name], action = fitted(
            whole.source,
            whole.tensor,
            table[name],
            ids,
            most_padding=PADDED_TO * len(parts) - 1,
            action=whole.action,
        )
        first = first or whole
        _check_alike(whole, first)
        steps.append(Step(source=whole.source, shape=shape, action=action, target=name))
    _fill(tensors, steps, table.values())
    origin = {"made_by": "tools/convert_metaseq.py", "files": [str(path) for path in files]}
    return Conversion(
        config=config, ids=ids, tensors=tensors, steps=steps, origin=origin, unchanged=unchanged
    )


def _check_parts(source: str, count: int, wholes: Iterable[Whole]) -> None:
    """Raise UsageError if the parts at the end are missing: queries have as many rows as columns.

    Settings do not tell: a checkpoint that was split anew keeps those of its training.
    """
    for whole in wholes:
        shape = whole.tensor.shape
        if not whole.key.endswith("self_attn.q_proj.weight") or len(shape) != 2:
            continue
        if shape[0] < shape[1]:
            due = -(-count * shape[1] // max(1, shape[0]))
            raise UsageError(
                f"{source}: {whole.source} has {shape[0]} of {shape[1]} rows in {count} model"
                f" part(s): of {due} parts {due - count} are missing: copy the whole checkpoint"
            )


def _targets(wholes: Iterable[Whole], config: ModelConfig, table: Container[str]) -> dict[str, str]:
    """The weight that each key becomes; UsageError of one that is unknown, and of two of a weight:
    which of them is meant, nobody knows."""
    names: dict[str, str] = {}
    sources: dict[str, str] = {}
    for whole in wholes:
        if why_dropped(whole.key, config):
            continue
        name = canonical_name(whole.key, config)
        if name is None or name not in table:
            raise UsageError(f"the checkpoint has {whole.source}, which no known model has")
        if name in sources:
            raise UsageError(
                f"{sources[name]} and {whole.source} both give {name}: save the checkpoint with"
                " one of them"
            )
        names[whole.key], sources[name] = name, whole.source
    return names


def _check_kind(whole: Whole, entry: Parameter) -> None:
    """Raise UsageError unless a tensor may be the weight by its dtype and number of dimensions."""
    shape = whole.tensor.shape
    if whole.tensor.dtype not in FLOATS:
        raise UsageError(
            f"{whole.source} is {_dtype(whole)}, quantised or no weight: save it as float16"
        )
    if len(shape) != len(entry.shape):
        raise UsageError(
            f"{whole.source} has shape {list(shape)}, but {entry.name} is {list(entry.shape)}: is"
            " this a checkpoint of metaseq?"
        )


def _check_alike(whole: Whole, first: Whole) -> None:
    """Raise UsageError unless two tensors have one dtype."""
    if whole.tensor.dtype != first.tensor.dtype:
        raise UsageError(
            f"{first.source} is {_dtype(first)}, but {whole.source} is {_dtype(whole)}: save the"
            " checkpoint with all weights in one of them"
        )


def _dtype(whole: Whole) -> str:
    return str(whole.tensor.dtype).removeprefix("torch.")


def _fill(tensors: dict[str, Lazy], steps: list[Step], table: Iterable[Parameter]) -> None:
    """Add the weights that no key gives, where zeros are the same; UsageError for others."""
    dtype = next(iter(tensors.values())).dtype
    for entry in table:
        name = entry.name
        if name in tensors:
            continue
        # The authors' bridges have no biases in their attention.
        if not (name.startswith("bridges.") and ".attention." in name and name.endswith("bias")):
            raise UsageError(f"the checkpoint has nothing that gives {name}")
        tensors[name] = zeros(entry.shape, dtype)
        steps.append(Step(source="", shape=entry.shape, action="zeros", target=name))
