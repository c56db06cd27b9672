"""Training in bf16: close to fp32, resumed bit for bit, with gradients summed in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import RunConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.loop import Training
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pool import WorkerPool
from tests.helpers.training import HALF, LAYOUTS, losses, settings, tensors


def train(world: World, values: dict[str, Any]) -> set[tuple[torch.dtype, ...]]:
    """Run; return the dtypes of (parameter, its gradient's buffer, the optimizer's own copy)."""
    config = RunConfig(**values)
    training = Training(config, WeightsFolder(config.weights), world, lambda *_: {})
    training.run()
    parameters = [p for chunk in training.chunks for p in chunk.parameters()]
    (optimizer,) = training.engine.optimizer.chained_optimizers
    (masters,) = {p.dtype for group in optimizer.optimizer.param_groups for p in group["params"]}
    assert all(p.main_grad.any() for p in parameters)
    return {(p.dtype, p.main_grad.dtype, masters) for p in parameters}


@pytest.fixture(scope="module")
def losses_in_fp32(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Of the same steps on one rank, by step."""
    output = tmp_path_factory.mktemp("fp32")
    pool.run(train, ParallelConfig(), settings(material, output, ParallelConfig()))
    return losses(output)


@pytest.mark.parametrize("layout", [pytest.param("tp2-pp2", marks=pytest.mark.slow), "dp2"])
def test_bf16_trains_and_resumes(
    pool: WorkerPool,
    layout: str,
    material: tuple[Path, Path],
    losses_in_fp32: list[float],
    tmp_path: Path,
) -> None:
    parallel, data = LAYOUTS[layout]

    def run(name: str, **changes: Any) -> set[tuple[torch.dtype, ...]]:
        values = {**settings(material, tmp_path / name, parallel), **changes}
        return set().union(*pool.run(train, parallel, values, data=data))

    assert run("whole", precision="bf16") == {(torch.bfloat16, torch.float32, torch.float32)}
    assert losses(tmp_path / "whole") == pytest.approx(losses_in_fp32, abs=2e-2)
    assert losses(tmp_path / "whole") != losses_in_fp32
    run("broken", precision="bf16", stop_at=HALF)
    run("broken", precision="bf16")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert {value.dtype for value in one.values()} == {torch.bfloat16}
    assert all(torch.equal(one[name], other[name]) for name in one)
