"""A training checkpoint as a weights folder, tensor by tensor, without ranks or a model."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, load

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, read_settings
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.models.sharding import unpack
from megatron_jam.parallel.device import DTYPES
from megatron_jam.training.manifest import find_damage, read_manifest
from megatron_jam.weights.folder import CONFIG, FolderWriter

SETTINGS, MODEL, HISTORY = "run.yaml", "model", "history.json"
"""What a checkpoint says of its run: resolved settings; config, vocabulary and tokenizer; and, in
that folder, what a weights folder's provenance is to say."""


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the weights of a training checkpoint, in the run's precision.

    At most one parameter with the weights that are packed into it is held in memory. Megatron's
    files hold pickles: a checkpoint is trusted input.

    Raises:
        UsageError: it is damaged, which is said file by file, or lacks a weight of its model.
    """
    if not checkpoint.is_dir():
        raise UsageError(
            f"{checkpoint} is no folder; name one such as RUN/checkpoints/step-00000100"
        )
    damage = find_damage(checkpoint)
    if damage:
        raise UsageError(f"damaged checkpoint: {'; '.join(damage[:3])}")
    step = read_manifest(checkpoint)["step"]
    config = ModelConfig.from_dict(read_json(checkpoint / MODEL / CONFIG))
    settings = read_settings(checkpoint / SETTINGS)
    tokens = step * settings["global_batch_size"] * settings["context_length"]
    table = parameter_table(config)
    with FolderWriter(
        folder,
        config=config,
        source=checkpoint / MODEL,
        shapes={entry.name: entry.shape for entry in table},
        dtype=DTYPES[settings["precision"]],
    ) as writer:
        for name, tensor in _weights(checkpoint, table):
            writer.write(name, tensor)
        history = read_json(checkpoint / MODEL / HISTORY)
        writer.finish({**history, "steps": step, "tokens": tokens})


def _weights(checkpoint: Path, table: list[Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Each weight by its name, in the order of the table."""
    reader = _Reader(checkpoint)
    held = reader.read_metadata().state_dict_metadata
    packed: dict[str, list[Parameter]] = defaultdict(list)
    for entry in table:
        packed[entry.module].append(entry)
    ready: dict[str, Tensor] = {}
    for entry in table:
        if entry.name not in ready:
            if entry.module not in held:
                raise UsageError(f"{checkpoint} has no {entry.module}, which its model needs")
            about = held[entry.module]
            whole = torch.empty(about.size, dtype=about.properties.dtype)
            load({entry.module: whole}, storage_reader=reader, no_dist=True)
            ready.update(unpack(whole, packed[entry.module]))
        value = ready.pop(entry.name)
        # Another TP pads the vocabulary differently.
        yield entry.name, value[: entry.shape[0]] if entry.is_vocabulary else value


class _Reader(FileSystemReader):
    """Reads the list of all tensors once, not for each of them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata
