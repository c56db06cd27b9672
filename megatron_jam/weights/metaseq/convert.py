"""A checkpoint of metaseq as a weights folder, tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary
from megatron_jam.weights.certificate import certify
from megatron_jam.weights.folder import FolderWriter
from megatron_jam.weights.lazy import Lazy, rows, zeros
from megatron_jam.weights.metaseq.files import find_parts
from megatron_jam.weights.metaseq.merge import Whole, read_parts
from megatron_jam.weights.metaseq.names import DROPPED, canonical_name, model_config

PADDED_TO = 8
"""metaseq pads its vocabulary to a multiple of this, for each tensor-parallel part."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What becomes of one tensor of the checkpoint."""

    source: str
    """Its key there."""

    shape: tuple[int, ...]
    """Its whole shape."""

    action: str
    """What is done with it."""

    target: str
    """Canonical name; "" of what is dropped."""


class Conversion:
    """A checkpoint that was read, and the plan of what becomes of it."""

    def __init__(
        self, source: str, tokenizer: Path, *, num_heads: int = 0, activation: str = ""
    ) -> None:
        """Read all but the tensors, and plan.

        Args:
            source: a file, a folder or a pattern of files.
            tokenizer: folder with the tokenizer.json and vocabulary.json of the checkpoint.
            num_heads: in place of what the checkpoint says; 0 takes that.
            activation: likewise; "" takes that.

        Raises:
            UsageError: the checkpoint is not whole, or is no model that towers here can compute.
        """
        self.vocabulary = JointVocabulary.load(tokenizer / VOCABULARY_FILE)
        self._tokenizer = tokenizer
        self.parts = find_parts(source)
        settings, wholes = read_parts(self.parts)
        self.config: ModelConfig = model_config(
            settings,
            {whole.key: whole.tensor for whole in wholes},
            vocab_size=self.vocabulary.size,
            num_heads=num_heads,
            activation=activation,
        )
        self.steps: list[Step] = []
        self._tensors: dict[str, Lazy] = {}
        table = {entry.name: entry for entry in parameter_table(self.config)}
        for whole in wholes:
            self._add(whole, table)
        self._fill(table)

    def _add(self, whole: Whole, table: dict[str, Parameter]) -> None:
        """Plan one tensor; one that is unknown is a mistake."""
        shape = whole.tensor.shape
        if whole.key in DROPPED:
            action = f"drop: {DROPPED[whole.key]}"
            self.steps.append(Step(source=whole.source, shape=shape, action=action, target=""))
            return
        name = canonical_name(whole.key, self.config)
        if name not in table:
            raise UsageError(f"the checkpoint has {whole.source}, which no known model has")
        tensor, action, entry = whole.tensor, whole.action, table[name]
        padding = shape[0] - self.vocabulary.size
        if entry.is_vocabulary and padding:
            if not 0 < padding < PADDED_TO * len(self.parts):
                raise UsageError(
                    f"the checkpoint has {shape[0]:,} token rows, but {self._tokenizer} has"
                    f" {self.vocabulary.size:,} ids: name the tokenizer of this model"
                )
            tensor, action = rows(tensor, 0, self.vocabulary.size), f"{action}, drop {padding} rows"
        if tensor.shape != entry.shape:
            raise UsageError(
                f"{whole.source} has shape {list(shape)}, but {name} is {list(entry.shape)}: a part"
                " may be missing"
            )
        self.steps.append(Step(source=whole.source, shape=shape, action=action, target=name))
        self._tensors[name] = tensor

    def _fill(self, table: dict[str, Parameter]) -> None:
        """The authors' bridges have no biases in their attention: zeros are the same."""
        (dtype, *_) = {tensor.dtype for tensor in self._tensors.values()}
        for name, entry in table.items():
            if name in self._tensors:
                continue
            if not (
                name.startswith("bridges.") and ".attention." in name and name.endswith("bias")
            ):
                raise UsageError(f"the checkpoint has nothing that gives {name}")
            self._tensors[name] = zeros(entry.shape, dtype)
            self.steps.append(Step(source="", shape=entry.shape, action="zeros", target=name))

    def write(self, output: Path) -> dict[str, Any]:
        """Write the weights folder, in the checkpoint's dtype, and return its certificate.

        Raises:
            UsageError: `output` is another kind of folder, or the result is not the source.
        """
        shapes = {entry.name: entry.shape for entry in parameter_table(self.config)}
        (dtype, *others) = sorted({t.dtype for t in self._tensors.values()}, key=str)
        if others:
            raise UsageError(f"the checkpoint mixes {dtype} and {others[0]}")
        with FolderWriter(
            output, config=self.config, source=self._tokenizer, shapes=shapes, dtype=dtype
        ) as writer:
            for name in shapes:
                writer.write(name, self._tensors[name].read())
            certificate = certify(
                self.config, lambda name: self._tensors[name].read(), writer.read_back
            )
            files = [str(path) for shards in self.parts for path in shards]
            writer.finish(
                {
                    "made_by": "tools/convert_metaseq.py",
                    "files": files,
                    "certificate": certificate,
                }
            )
        return certificate
