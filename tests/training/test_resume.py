"""A stopped and resumed run is the undisturbed one; state moves between layouts."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_jam.config.data import DataConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.loader import build_dataset
from megatron_jam.training.checkpoint import complete_checkpoints
from megatron_jam.training.manifest import read_manifest, write_manifest
from megatron_jam.training.metrics import read_metrics
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance
from tests.helpers.training import (
    HALF,
    LAYOUTS,
    STEPS,
    losses,
    run_training,
    settings,
    tensors,
)


@pytest.fixture(scope="module")
def whole(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Outputs of undisturbed runs on one rank, of the models that are asked for."""
    root = tmp_path_factory.mktemp("whole")

    @cache
    def run(kind: str) -> Path:
        chosen = (material[0].with_name(kind), material[1])
        pool.run(run_training, ParallelConfig(), settings(chosen, root / kind, ParallelConfig()))
        return root / kind

    return run


@pytest.fixture
def stopped(half: Path, tmp_path: Path) -> Path:
    """A run that stopped half-way, to be spoilt."""
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.fixture(scope="module")
def half(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on one rank that stopped half-way."""
    output = tmp_path_factory.mktemp("half") / "run"
    values = settings(material, output, ParallelConfig(), stop_at=HALF)
    pool.run(run_training, ParallelConfig(), values)
    return output


def test_resumed_run_is_bit_exact(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """Other layouts: tests/training/test_stop.py."""
    layout = "tp2-pp2"
    parallel, data = LAYOUTS[layout]
    whole = settings(material, tmp_path / "whole", parallel)
    pool.run(run_training, parallel, whole, data=data)
    broken = settings(material, tmp_path / "broken", parallel)
    pool.run(run_training, parallel, {**broken, "stop_at": HALF}, data=data)
    assert not (tmp_path / "broken" / "weights").exists()
    assert [p.name for p in complete_checkpoints(tmp_path / "broken/checkpoints")] == [
        f"step-{HALF:08d}"
    ]
    pool.run(run_training, parallel, broken, data=data)
    assert len(losses(tmp_path / "whole")) == STEPS
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("one", "tp2", "chameleon"),
        ("tp2", "one", "weights"),
        ("dp2", "tp2-pp2", "chameleon"),
        pytest.param("one", "tp2", "weights", marks=pytest.mark.slow),
        pytest.param("tp2", "one", "chameleon", marks=pytest.mark.slow),
        pytest.param("dp2", "tp2-pp2", "weights", marks=pytest.mark.slow),
    ],
)
def test_resumes_under_another_layout(
    pool: WorkerPool,
    first: str,
    second: str,
    kind: str,
    material: tuple[Path, Path],
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The same batches, and losses within rounding; also of gates, which each rank holds beside
    their linear's rows, of norms of heads and of an untied head."""
    material = (material[0].with_name(kind), material[1])
    for layout, stop in ((first, HALF), (second, 0)):
        parallel, data = LAYOUTS[layout]
        values = settings(material, tmp_path / "moved", parallel)
        pool.run(run_training, parallel, {**values, "stop_at": stop}, data=data)
    assert losses(tmp_path / "moved") == pytest.approx(losses(whole(kind)), rel=1e-5)
    assert distance(tensors(whole(kind)), tensors(tmp_path / "moved")) < 1e-5


@pytest.mark.parametrize("kind", ["weights", "chameleon"])
def test_moments_move_to_another_tensor_parallel_size(
    pool: WorkerPool, kind: str, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """Saved at TP=1, loaded by fresh processes' optimizers at TP=2: bit for bit the same."""
    material = (material[0].with_name(kind), material[1])
    values = settings(material, tmp_path / "run", ParallelConfig())
    saved = pool.run(run_training, ParallelConfig(), {**values, "stop_at": HALF}, True)[0]
    parallel = ParallelConfig(tensor=2)
    moved = {**settings(material, tmp_path / "run", parallel), "stop_at": HALF}
    loaded = pool.run(run_training, parallel, moved, True)[0]
    assert saved.keys() == loaded.keys()
    assert max(float(v.abs().max()) for v in saved.values()) > 0
    for name, value in saved.items():
        assert torch.equal(value, loaded[name]), name


def test_checkpoint_of_another_vocabulary_is_refused(
    pool: WorkerPool, material: tuple[Path, Path], stopped: Path
) -> None:
    values = settings(material, stopped, ParallelConfig())
    (path,) = complete_checkpoints(stopped / "checkpoints")
    manifest = read_manifest(path)
    write_manifest(path, {**manifest, "identity": {**manifest["identity"], "vocabulary": "x"}}, {})
    with pytest.raises(RuntimeError, match="was made with another `vocabulary`"):
        pool.run(run_training, ParallelConfig(), values)


@pytest.mark.parametrize(
    ("setting", "value"), [("seed", 1), ("global_batch_size", 8), ("context_length", 16)]
)
def test_a_run_keeps_the_settings_that_fix_its_batches(
    pool: WorkerPool, setting: str, value: int, material: tuple[Path, Path], stopped: Path
) -> None:
    values = settings(material, stopped, ParallelConfig())
    with pytest.raises(RuntimeError, match=f"was made with another `{setting}`"):
        pool.run(run_training, ParallelConfig(), {**values, setting: value})


def test_fewer_steps_than_were_made_are_refused(
    pool: WorkerPool, material: tuple[Path, Path], stopped: Path
) -> None:
    values = settings(material, stopped, ParallelConfig())
    with pytest.raises(RuntimeError, match="steps is 1, but the run has made 2 already"):
        pool.run(run_training, ParallelConfig(), {**values, "steps": 1})
    assert not (stopped / "weights").exists()


def test_a_run_may_go_on_with_another_learning_rate(
    pool: WorkerPool, material: tuple[Path, Path], stopped: Path
) -> None:
    values = settings(material, stopped, ParallelConfig())
    optimizer = dataclasses.replace(values["optimizer"], learning_rate=3e-3)
    pool.run(run_training, ParallelConfig(), {**values, "optimizer": optimizer})
    lines = [x for x in read_metrics(stopped / "metrics.jsonl") if x["kind"] == "train"]
    rates = [values["optimizer"].rate(step, STEPS) for step in range(HALF)]
    rates += [optimizer.rate(step, STEPS) for step in range(HALF, STEPS)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)


def test_a_torn_line_of_metrics_is_dropped(
    pool: WorkerPool, material: tuple[Path, Path], stopped: Path
) -> None:
    values = settings(material, stopped, ParallelConfig())
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    pool.run(run_training, ParallelConfig(), values)
    assert len(losses(stopped)) == STEPS


def test_only_complete_checkpoints_count_and_old_ones_go(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    values = settings(material, tmp_path / "run", ParallelConfig())
    pool.run(run_training, ParallelConfig(), {**values, "checkpoint_every": 1})
    folder = tmp_path / "run/checkpoints"
    assert [p.name for p in complete_checkpoints(folder)] == ["step-00000003", "step-00000004"]
    (folder / "step-00000004/jam.json").unlink()
    assert [p.name for p in complete_checkpoints(folder)] == ["step-00000003"]


def test_isolated_documents_reach_the_model(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """The first step's loss is the plain reference's, each document read by itself."""
    found = []
    for isolated in (False, True):
        values = settings(material, tmp_path / str(isolated), ParallelConfig())
        data = DataConfig(sets=values["data"].sets, isolate_documents=isolated)
        changed = {"data": data, "steps": 1, "validation": []}
        pool.run(run_training, ParallelConfig(), {**values, **changed})
        found.append(losses(tmp_path / str(isolated))[0])
    folder = WeightsFolder(material[0])
    assert found[1] == pytest.approx(isolated_loss(folder, data), rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def isolated_loss(folder: WeightsFolder, data: DataConfig) -> float:
    """Loss of the first batch by the plain reference, each document's part read by itself."""
    dataset = build_dataset(data, folder.vocabulary, context_length=32, seed=0)
    nats = []
    for sample in (dataset.sample(i) for i in range(2)):
        tokens = torch.from_numpy(np.append(sample.tokens, sample.labels[-1])).long()
        for number in np.unique(sample.documents):
            part = tokens[torch.from_numpy(sample.documents == number)]
            if len(part) > 1:
                logits = reference_logits(folder.config, folder.read, part[None, :-1])[0]
                nats.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
    return float(torch.cat(nats).mean())
