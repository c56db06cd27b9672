"""Whole runs with layers of stand-ins: checkpoints of both backends, shared sequences."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance
from tests.helpers.training import HALF, losses, run_training, settings, tensors
from tests.helpers.transformer_engine import with_stand_ins

ONE = ParallelConfig()
SHARED = ParallelConfig(context=2)


def run_fused(world: World, values: dict[str, Any]) -> None:
    """A run with stand-ins for Transformer Engine's layers."""

    def run(world: World, values: dict[str, Any], backend: str) -> None:
        run_training(world, {**values, "backend": backend})

    with_stand_ins(world, run, values)


@pytest.mark.parametrize(
    ("kind", "fused_first"),
    [
        ("weights", True),
        ("chameleon", False),
        pytest.param("weights", False, marks=pytest.mark.slow),
        pytest.param("chameleon", True, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_with_the_other_backend(
    kind: str, fused_first: bool, material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """The moments of a norm move between its own module and the linear layer behind it."""
    material = (material[0].with_name(kind), material[1])
    pool.run(run_training, ONE, settings(material, tmp_path / "whole", ONE))
    runs = (run_fused, run_training) if fused_first else (run_training, run_fused)
    for run, stop in zip(runs, (HALF, 0), strict=True):
        pool.run(run, ONE, settings(material, tmp_path / "moved", ONE, stop_at=stop))
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert distance(tensors(tmp_path / "whole"), tensors(tmp_path / "moved")) < 1e-5


def test_ranks_that_share_sequences_learn_the_same(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Losses, validation, export; stopped on two ranks and resumed on one without them."""
    pool.run(run_training, ONE, settings(material, tmp_path / "one", ONE))
    pool.run(run_fused, SHARED, settings(material, tmp_path / "shared", SHARED))
    for parallel, stop in ((SHARED, HALF), (ONE, 0)):
        pool.run(
            run_fused, parallel, settings(material, tmp_path / "moved", parallel, stop_at=stop)
        )
    expected = tensors(tmp_path / "one")
    for name in ("shared", "moved"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert distance(expected, tensors(tmp_path / name)) < 1e-5
    measured = [validation(tmp_path / name) for name in ("one", "shared")]
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


def validation(output: Path) -> float:
    """Loss of the validation set at the end."""
    lines = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "validation"][-1]


def test_a_run_records_what_it_computed_with(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    pool.run(run_fused, ONE, settings(material, tmp_path / "run", ONE, stop_at=1))
    values = json.loads((tmp_path / "run/environment.json").read_text())
    parts = {part["name"]: part["uses"] for part in values["parts"]}
    assert parts == {
        "layers": "transformer_engine",
        "Adam": "megatron_jam.parallel.adam.Adam",
        "weight gradients": "added within the product",
        "csrc": "CPU kernels",
    }
    assert "backend: transformer_engine" in (tmp_path / "run/run.yaml").read_text()
