"""`engine: deepspeed` trains as Megatron's engine does, and their checkpoints are the same."""

import json
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_jam.config.deepspeed import DeepSpeedConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import FactorsConfig, OptimizerConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.export import export_checkpoint
from megatron_jam.training.health import Health
from megatron_jam.training.metrics import read_metrics
from megatron_jam.training.zero_setup import import_deepspeed
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance
from tests.helpers.training import forget_worlds, losses, run_training, settings, tensors

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="the optional group deepspeed is not installed"
)

ALONE = ParallelConfig()
STEPS = 20
# With two micro-batches of each of two ranks, and every weight split by stage 3.
RUN = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2}
KINDS: dict[str, dict[str, Any]] = {
    "megatron": {},
    "stage 2": {"stage": 2},
    "stage 2, optimizer on the host": {"stage": 2, "offload_optimizer": True},
    "stage 3": {"stage": 3, "keep_whole_below": 0},
    "stage 3, small weights whole": {"stage": 3, "keep_whole_below": 500},
    "stage 3, optimizer on the host": {
        "stage": 3,
        "offload_optimizer": True,
        "keep_whole_below": 0,
    },
}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Workers that end with this file: DeepSpeed keeps groups, and their threads, for good."""
    workers = WorkerPool()
    yield workers
    workers.close()


def run_zero(world: World, values: dict[str, Any]) -> None:
    """A run with DeepSpeed."""
    forget_worlds(world)
    run_training(world, values)


def run(
    pool: WorkerPool,
    material: tuple[Path, Path],
    output: Path,
    kind: str,
    data: int = 2,
    **changes: Any,
) -> None:
    values = settings(material, output, ALONE, **{**RUN, **changes})
    if kind == "megatron":
        pool.run(run_training, ALONE, values, data=data)
        return
    values |= {"engine": "deepspeed", "deepspeed": DeepSpeedConfig(**KINDS[kind])}
    pool.run(run_zero, ALONE, values, data=data)


def part_norms(output: Path) -> list[dict[str, float]]:
    """Norms of the parts of each step's gradient, which add up to its norm."""
    lines = [x for x in read_metrics(output / "metrics.jsonl") if x["kind"] == "train"]
    for line in lines:
        whole = math.sqrt(sum(norm**2 for norm in line["grad_norm_by_part"].values()))
        assert whole == pytest.approx(line["grad_norm"], rel=1e-5)
    return [line["grad_norm_by_part"] for line in lines]


@pytest.fixture(scope="module")
def calm(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Megatron's engine, undisturbed."""
    output = tmp_path_factory.mktemp("calm") / "run"
    run(pool, material, output, "megatron")
    assert len(losses(output)) == STEPS
    return output


@pytest.mark.parametrize(
    "kind",
    [
        "stage 3, small weights whole",
        # Stage 2 by default: checkpoints that move between engines, below.
        pytest.param("stage 2, optimizer on the host", marks=pytest.mark.slow),
        pytest.param("stage 2", marks=pytest.mark.slow),
        pytest.param("stage 3", marks=pytest.mark.slow),
        pytest.param("stage 3, optimizer on the host", marks=pytest.mark.slow),
    ],
)
def test_both_engines_learn_the_same(
    pool: WorkerPool, material: tuple[Path, Path], calm: Path, tmp_path: Path, kind: str
) -> None:
    """Losses of 20 steps within 1e-4 of each other (they are far closer), the final weights, and
    the norms of the gradient's parts."""
    run(pool, material, tmp_path / "run", kind)
    norms, due = part_norms(tmp_path / "run"), part_norms(calm)
    assert set(due[0]) == {"image", "text", "bridges", "embeddings", "head"}
    for one, other in zip(norms, due, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert losses(tmp_path / "run") == pytest.approx(losses(calm), abs=1e-4)
    assert distance(tensors(calm), tensors(tmp_path / "run")) < 1e-4


def test_checkpoints_move_between_stages_engines_and_numbers_of_ranks(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also gates, norms of heads and an untied head; a frozen tower; a factor of the rate."""
    material = (material[0].with_name("chameleon"), material[1])
    factors = FactorsConfig(bridges=2.0)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, epsilon=1e-4, factors=factors)
    changes = {"steps": 8, "freeze": ["text"], "optimizer": optimizer}
    run(pool, material, tmp_path / "calm", "megatron", **changes)
    kinds = {"stage 2": 1, "stage 3": 2, "megatron": 1, "stage 2, optimizer on the host": 2}
    for (kind, ranks), stop in zip(kinds.items(), (2, 4, 6, 0), strict=True):
        run(pool, material, tmp_path / "moved", kind, ranks, **changes, stop_at=stop)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "calm"), abs=1e-4)
    assert distance(tensors(tmp_path / "calm"), tensors(tmp_path / "moved")) < 1e-4


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param("stage 3, small weights whole", "bf16", marks=pytest.mark.slow),
        pytest.param("stage 2", "fp32", marks=pytest.mark.slow),
        pytest.param("stage 2, optimizer on the host", "bf16", marks=pytest.mark.slow),
        pytest.param("stage 3", "fp32", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path, kind: str, precision: str
) -> None:
    changes = {"steps": 4, "precision": precision}
    run(pool, material, tmp_path / "whole", kind, **changes)
    for stop in (2, 0):
        run(pool, material, tmp_path / "broken", kind, **changes, stop_at=stop)
    assert len(losses(tmp_path / "whole")) == 4
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    export_checkpoint(tmp_path / "broken/checkpoints/step-00000004", tmp_path / "out/weights")
    exported = tensors(tmp_path / "out")
    assert all(torch.equal(one[name], exported[name]) for name in one)


@pytest.mark.parametrize("kind", ["stage 2", pytest.param("stage 3", marks=pytest.mark.slow)])
def test_a_refused_step_changes_nothing(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """A run whose second step is skipped as a spike has, after it, the weights of the first."""
    for steps in (1, 2):
        values = settings(material, tmp_path / str(steps), ALONE, **RUN | {"steps": steps})
        values |= {"engine": "deepspeed", "deepspeed": DeepSpeedConfig(**KINDS[kind])}
        pool.run(run_judged, ALONE, values, data=2)
    one, other = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    assert all(torch.equal(one[name], other[name]) for name in one)
    (line,) = (tmp_path / "2/skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["step"], skipped["reason"]) == (2, "as it is the second")


def run_judged(world: World, values: dict[str, Any]) -> None:
    """A run that refuses the second step."""
    seen: list[float] = []

    def judge(self: Health, loss: float, norm: float) -> str:
        seen.append(norm)
        return "as it is the second" if len(seen) == 2 else ""

    with patch.object(Health, "judge", judge):
        run_zero(world, values)
    assert seen[0] > 0


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[deepspeed\]', or set engine to"):
        import_deepspeed(torch.device("cpu"))
