"""The optimizer's state is saved by the replicas that hold it, and loaded by any others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.world import World
from megatron_jam.training.moments import KINDS, Share, find_shares
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.state import bytes_to_write, sharded_state, take_state, unshare
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build

OVERLAP = ParallelConfig(overlap_gradients=True)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower whose weights' sizes divide by no number of replicas; its gates are two tensors."""
    config = pico_config("tower", num_layers=2, **LLAMA, bias=True)
    return pico_folder(tmp_path_factory.mktemp("moments") / "tower", config, dtype=torch.float32)


def state_of(world: World, path: Path) -> tuple[Any, Any, list[tuple[int, Share]]]:
    """Model and optimizer with buckets that are padded where there are replicas, and the shares."""
    chunks = build(WeightsFolder(path), world, torch.float32)
    wrapped = wrap_chunks(chunks, world, bucket_size=100)
    optimizer = build_optimizer(wrapped, OptimizerConfig())
    shares = find_shares(optimizer, world.replicas)
    numbered = enumerate(shares[id(each.parameter)] for each in holders(chunks[0]))
    return chunks, optimizer, list(numbered)


def expected(number: int, kind: str, share: Share) -> torch.Tensor:
    """What stands for the state of a weight: another number at each place."""
    places = torch.arange(share.weight.numel(), dtype=torch.float32)
    return places + 1e5 * number + 1e7 * KINDS.index(kind)


def save(world: World, path: Path, folder: Path) -> tuple[int, int]:
    """Bytes that this rank writes, and weights of which several replicas hold parts."""
    chunks, optimizer, shares = state_of(world, path)
    with torch.no_grad():
        for number, share in shares:
            for kind, tensor in share.tensors.items():
                tensor.copy_(expected(number, kind, share)[share.span])
    state = sharded_state(chunks, optimizer, world, is_loading=False)
    unshare(state)
    dist_checkpointing.save(state, str(folder))
    across = sum(sum(len(span) > 0 for span in share.spans) > 1 for _, share in shares)
    return bytes_to_write(state), across


def wrong(world: World, path: Path, folder: Path) -> list[str]:
    """What is not as it was saved."""
    chunks, optimizer, shares = state_of(world, path)
    state = sharded_state(chunks, optimizer, world, is_loading=True)
    take_state(chunks, optimizer, dist_checkpointing.load(state, str(folder)), world)
    return [
        f"{number} {kind}"
        for number, share in shares
        for kind, tensor in share.tensors.items()
        if not torch.equal(tensor, expected(number, kind, share)[share.span])
    ]


@pytest.mark.parametrize(("saving", "loading"), [(3, 1), (3, 2), (1, 3)])
def test_replicas_write_what_they_hold_and_others_load_it(
    saving: int, loading: int, tower: Path, pool: WorkerPool, tmp_path: Path
) -> None:
    """Whatever the borders between them, and with padding between buckets."""
    folder = tmp_path / "state"
    folder.mkdir()
    sizes, across = zip(*pool.run(save, OVERLAP, tower, folder, data=saving), strict=True)
    assert (across[0] > 0) == (saving > 1)
    weights = WeightsFolder(tower)
    numbers = sum(weights.read(name).numel() for name in weights.names)
    assert sum(sizes) == 4 * 4 * numbers  # weights, their copies and two moments, fp32
    assert max(sizes) < 2 * sum(sizes) / saving
    found = pool.run(wrong, OVERLAP, tower, folder, data=loading)
    assert found == [[]] * loading
