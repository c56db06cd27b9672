"""A weights folder's logits under any layout, for comparison with another program's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import num_parameters
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import load_weights

_NO_ARRAY = (
    *(ValueError, TypeError, SyntaxError, TokenError, RecursionError),
    *(MemoryError, OverflowError),
)
"""What numpy raises of an .npy file: it parses the header as Python, and makes room for what that
says before it reads."""


def read_array(path: Path) -> NDArray[Any]:
    """The array of an .npy file.

    Raises:
        UsageError: the file holds no array, an archive, pickles, or less than its header says.
    """
    try:
        # np.load would take archives and pickles too.
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except _NO_ARRAY as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is no .npy array: {why}") from error


@torch.no_grad()
def folder_logits(
    path: Path, ids: NDArray[np.int64], world: World, *, dtype: torch.dtype = torch.float32
) -> NDArray[np.float32] | None:
    """Logits of a weights folder; all ranks take part.

    Args:
        path: the folder.
        ids: int64 [B, S].
        world: the ranks; replicas compute the same.
        dtype: of weights and activations.

    Returns:
        float32 [B, S, V] of the vocabulary's true size on rank 0; None elsewhere.

    Raises:
        UsageError: the ids are no such array, or unknown to the model, or too long for it.
    """
    folder = WeightsFolder(path)
    config = folder.config
    if ids.ndim != 2 or ids.dtype != np.int64 or not ids.size:
        raise UsageError(f"ids are {ids.dtype} {list(ids.shape)}; give int64 [batch, sequence]")
    if not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise UsageError(
            f"ids reach from {ids.min()} to {ids.max()}; {path} knows 0 to {config.vocab_size - 1}"
        )
    if ids.shape[1] > config.max_positions:
        raise UsageError(
            f"ids have {ids.shape[1]} positions; {path} has max_positions {config.max_positions}"
        )
    world.parallel.check_length(ids.shape[1])
    chunks = [
        JamModel(config, world, dtype=dtype, chunk=i).eval()
        for i in range(world.parallel.interleave)
    ]
    load_weights(chunks, folder, world)
    found = _forward(chunks, torch.from_numpy(ids), world)
    if not (world.tensor.is_first and world.replicas.is_first):
        return None
    logits = torch.empty(*ids.shape, config.vocab_size, device=world.device)
    if found:
        logits.copy_(torch.cat(found, dim=1).transpose(0, 1)[: len(ids), :, : config.vocab_size])
    world.broadcast_from_last_stage(logits)
    return logits.cpu().numpy() if world.rank == 0 else None


def logits_if_room(path: Path, ids: NDArray[np.int64], world: World) -> NDArray[np.float32] | str:
    """`folder_logits` in fp32 on one rank, or a line that says why the memory does not hold it."""
    config = WeightsFolder(path).config
    # Weights, and logits twice: as they come, and whole.
    needed = 4 * (num_parameters(config) + 2 * ids.size * config.vocab_size)
    free = psutil.virtual_memory().available
    if needed > free:
        return f"models/ needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    logits = folder_logits(path, ids, world)
    assert logits is not None
    return logits


def _forward(chunks: list[JamModel], ids: Tensor, world: World) -> list[Tensor]:
    """Logits [S, 1, padded V] of each row, and of rows that fill up the last round of stages."""
    size = world.pipeline.size
    rows = torch.cat([ids, ids[-1:].expand(-len(ids) % size, -1)]).to(world.device)

    def step(batches: Iterator[Tensor], chunk: JamModel) -> tuple[Tensor, Callable]:
        tokens = next(batches)
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return chunk(tokens, places), lambda logits, non_loss_data: _whole(logits, world)

    iterators = [iter(rows.split(1)) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        seq_length=rows.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _whole(logits: Tensor, world: World) -> Tensor:
    """Of all tensor-parallel ranks' rows of the vocabulary."""
    parts = [torch.empty_like(logits) for _ in range(world.tensor.size)]
    dist.all_gather(parts, logits.contiguous(), group=world.tensor.group)
    return torch.cat(parts, dim=-1)
