"""Dropout: off in validation, alike where tensor parallelism needs it, the same after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.parallel import ParallelConfig
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance
from tests.helpers.training import (
    HALF,
    LAYOUTS,
    losses,
    run_training,
    settings,
    tensors,
)


def test_dropout_changes_training_alone(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """At a learning rate of 0 training losses move, validation does not."""
    found: dict[float, Any] = {}
    for rate in (0.0, 0.3):
        values = settings(material, tmp_path / str(rate), ParallelConfig(), dropout=rate)
        values["optimizer"] = type(values["optimizer"])(learning_rate=0, final_learning_rate=0)
        pool.run(run_training, ParallelConfig(), values)
        lines = (tmp_path / str(rate) / "metrics.jsonl").read_text().splitlines()
        validation = [line for line in lines if "validation" in line]
        found[rate] = losses(tmp_path / str(rate)), validation[-1].split('"loss":')[1]
    assert all(a != b for a, b in zip(found[0.0][0], found[0.3][0], strict=True))
    assert found[0.0][1] == found[0.3][1]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("tp2", marks=pytest.mark.slow),
        pytest.param("tp2-sp", marks=pytest.mark.slow),
        "tp2-pp2",  # also sequence parallel
    ],
)
def test_resumed_run_draws_the_same(
    layout: str, material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Under tensor parallelism: the run itself compares replicated weights as it begins again."""
    parallel, data = LAYOUTS[layout]
    whole = settings(material, tmp_path / "whole", parallel, dropout=0.2)
    pool.run(run_training, parallel, whole, data=data)
    broken = settings(material, tmp_path / "broken", parallel, dropout=0.2)
    for stop in (HALF, 0):
        pool.run(run_training, parallel, {**broken, "stop_at": stop}, data=data)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_recomputed_layers_draw_the_same(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    for kind in ("none", "full"):
        values = settings(material, tmp_path / kind, parallel, dropout=0.2, recompute=kind)
        pool.run(run_training, parallel, values)
    one, other = tensors(tmp_path / "none"), tensors(tmp_path / "full")
    assert losses(tmp_path / "none") == pytest.approx(losses(tmp_path / "full"), rel=1e-6)
    assert distance(one, other) < 1e-5
