"""Another program's checkpoint as a weights folder: the plan, the stream, the certificate."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.weights.certificate import certify
from megatron_jam.weights.folder import FolderWriter
from megatron_jam.weights.lazy import Lazy, rows


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

    tokenizer: Path
    """Folder with its tokenizer.json and vocabulary.json."""

    tensors: Mapping[str, Lazy]
    """Every weight, by canonical name."""

    steps: list[Step]
    """What becomes of each tensor of the checkpoint, in its order."""

    origin: Mapping[str, Any]
    """Where it comes from, for provenance.json."""

    def write(self, output: Path) -> dict[str, Any]:
        """Write the weights folder, in the checkpoint's dtype, and return its certificate.

        Raises:
            UsageError: `output` is another kind of folder, dtypes are mixed, or the result is not
                the source.
        """
        shapes = {entry.name: entry.shape for entry in parameter_table(self.config)}
        (dtype, *others) = sorted({t.dtype for t in self.tensors.values()}, key=str)
        if others:
            raise UsageError(f"the checkpoint mixes {dtype} and {others[0]}")
        with FolderWriter(
            output, config=self.config, source=self.tokenizer, shapes=shapes, dtype=dtype
        ) as writer:
            for name in shapes:
                writer.write(name, self.tensors[name].read())
            certificate = certify(
                self.config, lambda name: self.tensors[name].read(), writer.read_back
            )
            writer.finish({**self.origin, "certificate": certificate})
        return certificate


def fitted(
    key: str, tensor: Lazy, entry: Parameter, *, most_padding: int, action: str
) -> tuple[Lazy, str]:
    """A tensor as the model has it, without padding of the vocabulary, and what was done.

    Args:
        key: its name in the checkpoint, for messages.
        tensor: the whole tensor.
        entry: the weight that it becomes.
        most_padding: rows that a token table may have beyond the tokenizer's ids.
        action: what was done to have it whole.

    Raises:
        UsageError: it has another shape.
    """
    padding = tensor.shape[0] - entry.shape[0] if entry.is_vocabulary else 0
    if padding and not 0 < padding <= most_padding:
        raise UsageError(
            f"the checkpoint has {tensor.shape[0]:,} token rows, but the tokenizer has"
            f" {entry.shape[0]:,} ids: name the tokenizer of this model"
        )
    if padding:
        tensor = rows(tensor, 0, entry.shape[0])
        action = f"{action}, drop {padding} rows"
    if tensor.shape != entry.shape:
        raise UsageError(
            f"{key} has shape {list(tensor.shape)}, but {entry.name} is {list(entry.shape)}: a"
            " part may be missing"
        )
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
