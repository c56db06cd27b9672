"""Weight decay is for matrices alone."""

from pathlib import Path

import torch

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build


def decayed(world: World, path: Path) -> dict[str, bool]:
    """Whether each parameter is decayed, by its name in the model."""
    chunks = build(WeightsFolder(path), world, torch.float32)
    wrapped = wrap_chunks(chunks, world, distributed_optimizer=False)
    optimizer = build_optimizer(wrapped, OptimizerConfig(), distributed_optimizer=False)
    multiples = {id(p): g["wd_mult"] for g in optimizer.param_groups for p in g["params"]}
    return {name: multiples[id(p)] > 0 for name, p in chunks[0].named_parameters()}


def test_norms_and_biases_are_not_decayed(tmp_path: Path, pool: WorkerPool) -> None:
    config = pico_config("cross", **LLAMA, qk_norm=True, bias=True)
    path = pico_folder(tmp_path / "model", config, dtype=torch.float32)
    (result,) = pool.run(decayed, ParallelConfig(), path)
    assert any("norm_of_q.weight" in name for name in result)
    for name, is_decayed in result.items():
        assert is_decayed == ("norm" not in name and not name.endswith("bias")), name
