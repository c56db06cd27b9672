"""Weights folder -> this rank's parameters, and back."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.models.sharding import holders, read_holder, unpack
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import FolderWriter, WeightsFolder


@torch.no_grad()
def load_weights(chunks: Sequence[JamModel], folder: WeightsFolder, world: World) -> None:
    """Fill every parameter of this rank from the folder, reading only this rank's slices.

    Raises:
        UsageError: if the folder lacks a tensor, has another one, or a shape differs.
    """
    check_tensors(folder)
    for chunk in chunks:
        for holder in holders(chunk):
            holder.parameter.copy_(read_holder(holder, world.tensor, folder.read))


def check_tensors(folder: WeightsFolder) -> None:
    """Raise UsageError unless the folder holds exactly the tensors of its configuration."""
    table = {entry.name: entry.shape for entry in parameter_table(folder.config)}
    unknown = sorted(set(folder.names) - set(table))
    missing = sorted(set(table) - set(folder.names))
    if unknown or missing:
        raise UsageError(
            f"{folder.path}: tensors do not fit config.json; missing {missing[:3] or 'none'},"
            f" unknown {unknown[:3] or 'none'}"
        )
    for name, shape in table.items():
        if folder.shape(name) != shape:
            raise UsageError(
                f"{folder.path}: {name} has shape {folder.shape(name)}, config.json asks {shape}"
            )


def whole_weights(chunks: Sequence[JamModel], world: World) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each whole weight of the live model on rank 0 (None elsewhere), in the order of the
    table; all ranks take part."""
    local: dict[str, Tensor] = {}
    for chunk in chunks:
        for holder in holders(chunk):
            if not holder.is_copy:
                local.update(unpack(holder.parameter.detach(), holder.parts))
    table = parameter_table(chunks[0].model_config)
    return gather_whole(table, local, world, chunks[0].config.params_dtype)


def export_weights(
    whole: Iterator[tuple[str, Tensor | None]],
    config: ModelConfig,
    world: World,
    path: Path,
    *,
    source: Path,
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
) -> None:
    """Write a model as a weights folder, one tensor at a time; all ranks take part.

    Args:
        whole: its weights, as `whole_weights` yields them.
        config: the model.
        world: the ranks.
        path: folder to make (by rank 0).
        source: folder whose vocabulary.json and tokenizer.json are copied.
        dtype: of the tensors written.
        provenance: where the weights come from.
    """
    if world.rank != 0:
        for _ in whole:
            pass
        dist.barrier()
        return
    shapes = {entry.name: entry.shape for entry in parameter_table(config)}
    with FolderWriter(path, config=config, source=source, shapes=shapes, dtype=dtype) as writer:
        for name, tensor in whole:
            assert tensor is not None
            writer.write(name, tensor)
        writer.finish(provenance)
    dist.barrier()


def gather_whole(
    table: Sequence[Parameter], local: Mapping[str, Tensor], world: World, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each whole tensor on rank 0 (None elsewhere), in the order of the table."""
    stage_of = _stages(local, world)
    for entry in table:
        stage = stage_of[entry.name]
        whole = None
        if world.replicas.is_first and world.pipeline.rank == stage:
            whole = _join_slices(entry, local[entry.name], world)
        yield entry.name, _send_to_first(entry, whole, stage, world, dtype)


def _stages(local: Mapping[str, Tensor], world: World) -> dict[str, int]:
    """Pipeline stage that holds each tensor."""
    names: list[Any] = [None] * world.pipeline.size
    dist.all_gather_object(names, list(local), group=world.pipeline.group)
    return {name: stage for stage, held in enumerate(names) for name in held}


def _join_slices(entry: Parameter, part: Tensor, world: World) -> Tensor:
    if entry.split is None or world.tensor.size == 1:
        whole = part
    else:
        parts = [torch.empty_like(part) for _ in range(world.tensor.size)]
        dist.all_gather(parts, part.contiguous(), group=world.tensor.group)
        whole = torch.cat(parts, dim=entry.split)
    # Padded vocabulary rows exist in memory only.
    return whole[: entry.shape[0]] if entry.is_vocabulary else whole


def _send_to_first(
    entry: Parameter, whole: Tensor | None, stage: int, world: World, dtype: torch.dtype
) -> Tensor | None:
    """Move a whole tensor from the first tensor rank of `stage` to global rank 0."""
    if not (world.replicas.is_first and world.tensor.is_first):
        return None
    if stage == 0:
        return whole if world.pipeline.is_first else None
    source = dist.get_global_rank(world.pipeline.group, stage)
    if world.pipeline.is_first:
        received = torch.empty(entry.shape, dtype=dtype, device=world.device)
        dist.recv(received, source, group=world.pipeline.group)
        return received
    if world.pipeline.rank == stage:
        assert whole is not None
        dist.send(whole.contiguous(), 0, group=world.pipeline.group)
    return None
