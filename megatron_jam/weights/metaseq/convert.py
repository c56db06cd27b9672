"""A checkpoint of metaseq, read and planned."""

from collections.abc import Iterable
from pathlib import Path

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import Unchanged
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.weights.conversion import Conversion, Step, fitted
from megatron_jam.weights.ids import read_ids
from megatron_jam.weights.lazy import Lazy, zeros
from megatron_jam.weights.metaseq.files import find_parts
from megatron_jam.weights.metaseq.merge import read_parts
from megatron_jam.weights.metaseq.names import canonical_name, model_config, why_dropped

PADDED_TO = 8
"""metaseq pads its vocabulary to a multiple of this, for each tensor-parallel part."""


def read_metaseq(
    source: str, tokenizer: Path, *, num_heads: int = 0, activation: str = ""
) -> Conversion:
    """Read all but the tensors of a checkpoint, and plan its conversion.

    Args:
        source: a file, a folder or a pattern of files.
        tokenizer: folder with the checkpoint's tokenizer.json and vocabulary.json; the latter may
            be missing where tokens are named as CM3leon's.
        num_heads: in place of what the checkpoint says; 0 takes that.
        activation: likewise; "" takes that.

    Raises:
        UsageError: the checkpoint is not whole, or is no model that towers here can compute.
    """
    ids = read_ids(tokenizer)
    parts = find_parts(source)
    files = [path for shards in parts for path in shards]
    unchanged = Unchanged(files)
    settings, wholes = read_parts(parts)
    config = model_config(
        settings,
        {whole.key: whole.tensor for whole in wholes},
        vocab_size=ids.vocabulary.size,
        num_heads=num_heads,
        activation=activation,
    )
    table = {entry.name: entry for entry in parameter_table(config)}
    steps: list[Step] = []
    tensors: dict[str, Lazy] = {}
    for whole in wholes:
        shape = whole.tensor.shape
        if reason := why_dropped(whole.key, config):
            steps.append(Step(source=whole.source, shape=shape, action=f"drop: {reason}"))
            continue
        name = canonical_name(whole.key, config)
        if name not in table:
            raise UsageError(f"the checkpoint has {whole.source}, which no known model has")
        tensors[name], action = fitted(
            whole.source,
            whole.tensor,
            table[name],
            ids,
            most_padding=PADDED_TO * len(parts) - 1,
            action=whole.action,
        )
        steps.append(Step(source=whole.source, shape=shape, action=action, target=name))
    _fill(tensors, steps, table.values())
    origin = {"made_by": "tools/convert_metaseq.py", "files": [str(path) for path in files]}
    return Conversion(
        config=config, ids=ids, tensors=tensors, steps=steps, origin=origin, unchanged=unchanged
    )


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
