"""The checkpoint with the lowest average validation loss is marked, kept, and known later."""

import json
from pathlib import Path

import torch

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.training.best import BestCheckpoint
from megatron_jam.training.checkpoint import best_checkpoint, complete_checkpoints
from megatron_jam.training.losses import Losses
from megatron_jam.training.metrics import read_metrics
from tests.helpers.pool import WorkerPool
from tests.helpers.training import STEPS, run_training, settings


def measured(*nats: float) -> dict[str, Losses]:
    """Sets of one token each."""
    return {
        str(n): Losses(
            sums=torch.tensor([[value, 0, 0, 0]]).double(),
            counts=torch.tensor([[1, 0, 0, 0]]).double(),
        )
        for n, value in enumerate(nats)
    }


def best(output: Path) -> tuple[int, str]:
    return json.loads((output / "best.json").read_text())["step"], best_checkpoint(
        output / "checkpoints"
    )


def test_lowest_average_wins_in_either_order(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    callback = BestCheckpoint(tmp_path, writes=True)
    callback.begins(None, 0)  # type: ignore[arg-type]
    callback.validated(1, measured(3.0, 5.0))
    assert not (tmp_path / "best.json").exists(), "it is not saved"
    callback.saved(1, tmp_path)
    assert best(tmp_path) == (1, "step-00000001")
    callback.saved(2, tmp_path)
    callback.validated(2, measured(1.0, 6.9))
    assert best(tmp_path) == (2, "step-00000002")
    callback.validated(3, measured(0.0, 8.0))
    callback.saved(3, tmp_path)
    assert best(tmp_path) == (2, "step-00000002"), "its average is higher"
    callback.validated(4, measured(1.0, 1.0))
    callback.saved(5, tmp_path)
    assert best(tmp_path) == (2, "step-00000002"), "step 4 was not saved"
    resumed = BestCheckpoint(tmp_path, writes=True)
    resumed.begins(None, 5)  # type: ignore[arg-type]
    resumed.validated(6, measured(3.99, 3.99))
    resumed.saved(6, tmp_path)
    assert best(tmp_path) == (2, "step-00000002")
    resumed.validated(7, measured(float("nan"), 0.0))
    resumed.saved(7, tmp_path)
    assert best(tmp_path) == (2, "step-00000002"), "it is no number"
    earlier = BestCheckpoint(tmp_path, writes=True)
    earlier.begins(None, 1)  # type: ignore[arg-type]
    assert not (tmp_path / "best.json").exists(), "step 2 was lost"


def test_what_is_no_number_is_not_the_best_of_few(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    callback = BestCheckpoint(tmp_path, writes=True)
    callback.begins(None, 0)  # type: ignore[arg-type]
    for step, nats in ((1, float("nan")), (2, float("inf")), (3, 9.0)):
        callback.validated(step, measured(nats))
        callback.saved(step, tmp_path)
        assert (tmp_path / "best.json").exists() == (step == 3)
    assert best(tmp_path) == (3, "step-00000003")


def test_a_run_marks_its_best(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    every = {"validate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    values = settings(material, output, ParallelConfig(), **every)
    pool.run(run_training, ParallelConfig(), values)
    lines = [x for x in read_metrics(output / "metrics.jsonl") if x["kind"] == "validation"]
    due = min(lines, key=lambda line: line["loss"])["step"]
    assert best(output) == (due, f"step-{due:08d}")
    kept = {path.name for path in complete_checkpoints(output / "checkpoints")}
    # The last step is measured behind the last save, so what was best before is still there.
    assert {f"step-{due:08d}", f"step-{STEPS:08d}"} <= kept
    assert len(kept) <= 3 < STEPS
