"""Frozen towers: what stays, what learns, and that such runs save, resume and change layout."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.model import BridgeConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.parameters import parameter_table
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance
from tests.helpers.training import (
    HALF,
    LAYOUTS,
    SEPARATE,
    losses,
    run_training,
    settings,
    tensors,
)


def choose(material: tuple[Path, Path], kind: str) -> tuple[Path, Path]:
    return material[0].with_name(kind), material[1]


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [("weights", ["text"]), ("separate", ["image"]), ("late", ["image", "text"])],
)
def test_frozen_weights_stay_and_others_learn(
    kind: str, frozen: list[str], material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    chosen = choose(material, kind)
    values = settings(chosen, tmp_path / "run", ParallelConfig(), freeze=frozen)
    pool.run(run_training, ParallelConfig(), values)
    before, after = WeightsFolder(chosen[0]), tensors(tmp_path / "run")
    moved = {name for name in after if not torch.equal(before.read(name), after[name])}
    due = set()
    for entry in parameter_table(before.config):
        own = entry.tower in frozen and not entry.name.startswith("bridges.")
        due |= set() if own else {entry.name}
    assert moved == due
    assert 0 < len(due) < len(after)


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_recomputation_changes_nothing_of_a_frozen_run(
    layout: str, material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Also where nothing in front of the first bridge learns."""
    parallel, data = LAYOUTS[layout]
    for kind in ("none", "full"):
        changes: dict[str, Any] = {"freeze": ["image", "text"], "recompute": kind}
        values = settings(choose(material, "separate"), tmp_path / kind, parallel, **changes)
        pool.run(run_training, parallel, values, data=data)
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)
    assert distance(tensors(tmp_path / "none"), tensors(tmp_path / "full")) < 1e-5


def test_a_run_with_nothing_to_train_is_refused(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    bare = dataclasses.replace(SEPARATE, bridges=BridgeConfig(every=0))
    path = pico_folder(tmp_path / "bare", bare, dtype=torch.float32)
    values = settings((path, material[1]), tmp_path / "run", ParallelConfig())
    values["steps"] = 1
    with pytest.raises(RuntimeError, match="which leaves nothing to train"):
        pool.run(run_training, ParallelConfig(), {**values, "freeze": ["image", "text"]})
    pool.run(run_training, ParallelConfig(), {**values, "freeze": ["text"]})
    assert len(losses(tmp_path / "run")) == 1


# With both towers frozen and one late bridge the first of two stages has nothing to train.
@pytest.mark.parametrize(
    ("kind", "frozen", "first", "second"),
    [
        ("separate", ["text"], "pp2-dp2", "tp2"),
        ("late", ["image", "text"], "pp2", "pp2"),
        ("late", ["image", "text"], "one", "pp2"),
    ],
)
def test_frozen_runs_resume_under_any_layout(
    first: str,
    second: str,
    kind: str,
    frozen: list[str],
    material: tuple[Path, Path],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    chosen = choose(material, kind)
    changes: dict[str, Any] = {"freeze": frozen}
    base = settings(chosen, tmp_path / "whole", ParallelConfig(), **changes)
    pool.run(run_training, ParallelConfig(), base)
    for layout, stop in ((first, HALF), (second, 0)):
        parallel, data = LAYOUTS[layout]
        values = settings(chosen, tmp_path / "moved", parallel, stop_at=stop, **changes)
        pool.run(run_training, parallel, values, data=data)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert distance(tensors(tmp_path / "whole"), tensors(tmp_path / "moved")) < 1e-5
