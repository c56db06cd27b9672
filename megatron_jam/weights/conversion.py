"""Another program's checkpoint as a weights folder: the plan, the stream, the certificate."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_jam import __version__
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import Unchanged, check_not_read
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.weights.certificate import certify
from megatron_jam.weights.folder import FolderWriter
from megatron_jam.weights.ids import Ids
from megatron_jam.weights.lazy import Lazy, read_as, rows


@dataclass(frozen=True, kw_only=True)
class Step:
    """What becomes of one tensor of the checkpoint."""

    source: str
    """Its key there; "" of what no key gives."""

    shape: tuple[int, ...]
    """Its whole shape."""

    action: str
    """What is done with it."""

    target: str = ""
    """Canonical name; "" of what is dropped."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A checkpoint of which all but the tensors was read, and what becomes of it."""

    config: ModelConfig
    """The model that it holds."""

    ids: Ids
    """Its ids."""

    tensors: Mapping[str, Lazy]
    """Every weight, by canonical name; rows of tokens in the checkpoint's order."""

    steps: list[Step]
    """What becomes of each tensor of the checkpoint, in its order."""

    origin: Mapping[str, Any]
    """Where it comes from, for provenance.json."""

    unchanged: Unchanged
    """Its files."""

    def write(self, output: Path, *, file_bytes: int = 4 << 30) -> dict[str, Any]:
        """Write the weights folder, in the checkpoint's dtype, and return its certificate.

        An interrupted call leaves its whole files hidden beside `output`, and the next one of the
        same checkpoint goes on there.

        Args:
            output: the folder.
            file_bytes: largest size of one file, in bytes.

        Raises:
            UsageError: `output` is another kind of folder or holds the checkpoint, dtypes are
                mixed, a file was changed meanwhile, or the result is not the source.
        """
        check_not_read(output, *map(Path, self.unchanged.states))
        table = {entry.name: entry for entry in parameter_table(self.config)}
        shapes = {name: entry.shape for name, entry in table.items()}
        (dtype, *others) = sorted({t.dtype for t in self.tensors.values()}, key=str)
        if others:
            raise UsageError(f"the checkpoint mixes {dtype} and {others[0]}")
        with FolderWriter(
            output,
            config=self.config,
            source=self.ids.files,
            shapes=shapes,
            dtype=dtype,
            file_bytes=file_bytes,
            resume=self._key(),
        ) as writer:
            for name in writer.left:
                # Under no name here, where it would stay beside the next one.
                writer.write(name, self._whole(table[name]))
            certificate = certify(
                self.config,
                lambda name: read_as(self.tensors[name], torch.float32),
                writer.read_back,
                order=self.ids.order,
                stored=lambda name: self.tensors[name].read(),
            )
            self.unchanged.check()
            writer.finish({**self.origin, "certificate": certificate})
        return certificate

    def _whole(self, entry: Parameter) -> Tensor:
        tensor = self.tensors[entry.name].read()
        return self.ids.rows(tensor) if entry.is_vocabulary else tensor

    def _key(self) -> str:
        """What the folder's tensors are made of, in short."""
        order = None if self.ids.order is None else self.ids.order.tolist()
        made_of = [__version__, self.unchanged.states, dataclasses.asdict(self.config), order]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def fitted(
    key: str, tensor: Lazy, entry: Parameter, ids: Ids, *, most_padding: int, action: str
) -> tuple[Lazy, str]:
    """A tensor as the model has it, without padding of the vocabulary, and what was done.

    Args:
        key: its name in the checkpoint, for messages.
        tensor: the whole tensor.
        entry: the weight that it becomes.
        ids: the checkpoint's.
        most_padding: rows that a token table may have beyond the tokenizer's ids.
        action: what was done to have it whole.

    Raises:
        UsageError: it has another shape.
    """
    # One number has no rows; its shape is refused below.
    has_rows = entry.is_vocabulary and bool(tensor.shape)
    padding = tensor.shape[0] - entry.shape[0] if has_rows else 0
    if padding and not 0 < padding <= most_padding:
        raise UsageError(
            f"{key} has {tensor.shape[0]:,} token rows, but the tokenizer has"
            f" {entry.shape[0]:,} ids: name the tokenizer of this model"
            + (", or is a part of the checkpoint missing?" if padding < 0 else "")
        )
    if padding:
        tensor = rows(tensor, 0, entry.shape[0])
        action = f"{action}, drop {padding} rows"
    if tensor.shape != entry.shape:
        raise UsageError(
            f"{key} has shape {list(tensor.shape)}, but {entry.name} is {list(entry.shape)}: a"
            " part may be missing"
        )
    if entry.is_vocabulary and ids.order is not None:
        action = f"{action}, order rows by name"
    return tensor, action


def plan_as_text(steps: list[Step]) -> str:
    """A line for each tensor: its key and shape, what is done, and what it becomes."""
    lines = [("key", "shape", "action", "becomes")]
    for step in steps:
        shape = " x ".join(map(str, step.shape))
        lines.append((step.source or "-", shape, step.action, step.target or "-"))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "".join(
        "  ".join(each.ljust(width) for each, width in zip(line, widths, strict=False))
        + f"  {line[3]}\n"
        for line in lines
    )
