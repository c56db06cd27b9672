"""Weight decay is for matrices alone."""

from pathlib import Path

import torch

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.optimizer import build_optimizer, set_learning_rate, wrap_chunks
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build

RATE, DECAY = 0.01, 0.1


def decayed(world: World, path: Path) -> dict[str, float]:
    """By how much a step without any gradient shrinks each parameter, by its name in the model."""
    chunks = build(WeightsFolder(path), world, torch.float32)
    before = {name: value.detach().clone() for name, value in chunks[0].named_parameters()}
    wrapped = wrap_chunks(chunks, world)
    optimizer = build_optimizer(wrapped, OptimizerConfig(weight_decay=DECAY))
    set_learning_rate(optimizer, RATE)
    optimizer.step()
    return {
        name: float((1 - value / before[name]).detach().median())
        for name, value in chunks[0].named_parameters()
    }


def test_norms_and_biases_are_not_decayed(tmp_path: Path, pool: WorkerPool) -> None:
    config = pico_config("cross", **LLAMA, qk_norm=True, bias=True)
    path = pico_folder(tmp_path / "model", config, dtype=torch.float32)
    (result,) = pool.run(decayed, ParallelConfig(), path)
    assert any("norm_of_q.weight" in name for name in result)
    for name, shrunk in result.items():
        is_vector = "norm" in name or name.endswith("bias")
        assert abs(shrunk - (0 if is_vector else RATE * DECAY)) < 1e-5, name
