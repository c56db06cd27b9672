"""Between logical weights and this rank's parameters: which slice, and how it is packed."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import Parameter, learns, padded_vocabulary, parameter_table
from megatron_jam.parallel.world import Axis

ReadSlice = Callable[[str, int | None, int, int], Tensor]
"""(canonical name, dimension or None for the whole, start, stop) -> tensor."""

COPIES = "head.tables."
"""What the names of JamModel's second copies of token tables begin with, on the last stage."""


FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "cross_attention.linear_q.layer_norm_": "pre_cross_attn_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Where a norm in one with the linear layer behind it has its parameters, and where the table of
weights and every checkpoint have them."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A parameter of this rank and the logical weights packed into it."""

    key: str
    """Name of the parameter in JamModel with torch's layers; a tied copy has the name of the table
    it copies."""

    parameter: nn.Parameter
    parts: tuple[Parameter, ...]
    is_copy: bool = False
    """Whether another stage holds the same weight first (tied output rows)."""

    @property
    def split(self) -> int | None:
        """Dimension that tensor parallelism splits."""
        return self.parts[0].split


def holders(model: JamModel) -> list[Holder]:
    """Every parameter of this chunk with what it holds; marks them for Megatron's optimizer."""
    by_module: dict[str, list[Parameter]] = defaultdict(list)
    for entry in parameter_table(model.model_config):
        by_module[entry.module].append(entry)
    found = []
    for name, parameter in model.named_parameters():
        is_copy = model.model_config.tied and name.startswith(COPIES)
        key = f"embedding.tables.{name.removeprefix(COPIES)}.tokens.weight" if is_copy else name
        for fused, own in FUSED_NORMS.items():
            key = key.replace(fused, own)
        parts = tuple(by_module[key])
        holder = Holder(key=key, parameter=parameter, parts=parts, is_copy=is_copy)
        parallel = holder.split is not None
        if not hasattr(parameter, "tensor_model_parallel"):
            dim = holder.split if holder.split is not None else -1
            set_tensor_model_parallel_attributes(parameter, parallel, dim, 1)
        found.append(holder)
    for weight in model.tied_weights():
        weight.shared = model.post_process  # counted once in the gradient's norm
    return found


def freeze(model: JamModel, towers: Sequence[str]) -> None:
    """Leave a parent's weights in `towers` as they are."""
    for holder in holders(model):
        if not learns(holder.parts[0], towers):
            holder.parameter.requires_grad_(False)


def span(part: Parameter, tensor: Axis) -> tuple[int, int, int]:
    """Start and stop of this rank's real rows or columns, and how many it holds with padding."""
    assert part.split is not None
    size = part.shape[part.split]
    padded = padded_vocabulary(size, tensor.size) if part.is_vocabulary else size
    local = padded // tensor.size
    start = min(size, tensor.rank * local)
    return start, min(size, start + local), local


def read_holder(holder: Holder, tensor: Axis, read: ReadSlice) -> Tensor:
    """Read this rank's slices of the logical weights and pack them; padding is zero."""
    tensors = []
    for part in holder.parts:
        if part.split is None:
            tensors.append(read(part.name, None, 0, 0))
            continue
        start, stop, local = span(part, tensor)
        value = read(part.name, part.split, start, stop)
        missing = local - (stop - start)
        if missing:
            value = torch.cat([value, value.new_zeros(missing, *part.shape[1:])])
        tensors.append(value)
    return pack(tensors, holder.parts)


def pack(tensors: Sequence[Tensor], parts: Sequence[Parameter]) -> Tensor:
    """Fuse [rows, ...] of n projections unit by unit, as Megatron lays out qkv, kv and gates."""
    if len(parts) == 1:
        return tensors[0]
    ordered = sorted(zip(parts, tensors, strict=True), key=lambda pair: pair[0].part)
    units = [tensor.unflatten(0, (-1, part.unit or len(tensor))) for part, tensor in ordered]
    return torch.cat(units, dim=1).flatten(0, 1)


def unpack(fused: Tensor, parts: Sequence[Parameter]) -> dict[str, Tensor]:
    """Undo `pack`: the local slice of each logical weight by canonical name."""
    if len(parts) == 1:
        return {parts[0].name: fused}
    ordered = sorted(parts, key=lambda part: part.part)
    rows = [part.unit or len(fused) // len(parts) for part in ordered]
    units = fused.unflatten(0, (-1, sum(rows))).split(rows, dim=1)
    return {part.name: unit.flatten(0, 1) for part, unit in zip(ordered, units, strict=True)}


def logical_gradients(model: JamModel, gradient: Callable[[nn.Parameter], Tensor]) -> dict:
    """This rank's slice of each logical weight's gradient; tied copies are left out."""
    result = {}
    for holder in holders(model):
        if not holder.is_copy:
            result.update(unpack(gradient(holder.parameter), holder.parts))
    return result
