"""A checkpoint becomes the weights folder that the run would have written."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.export import export_checkpoint
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.verify import verify
from tests.helpers.pico import pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.training import CHAMELEON, LAYOUTS, build_training, run_training, settings
from tools.export_weights import main


def save_step_0(world: World, values: dict[str, Any]) -> None:
    training = build_training(world, values)
    training.checkpoints.save(0, {})
    training.checkpoints.finish()


@pytest.mark.parametrize(
    ("kind", "layout", "precision"),
    [
        ("weights", "one", "fp32"),
        ("chameleon", "tp2-pp2", "fp32"),
        ("separate", "pp2-dp2", "fp32"),
        ("chameleon", "tp2", "bf16"),
    ],
)
def test_a_folder_comes_back_from_step_0(
    kind: str,
    layout: str,
    precision: str,
    material: tuple[Path, Path],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    """Also padded rows, packed q, k, v and gates, and norms of heads."""
    parallel, data = LAYOUTS[layout]
    weights = material[0].with_name(kind)
    if precision == "bf16":
        weights = pico_folder(tmp_path / "bf16", CHAMELEON, dtype=torch.bfloat16)
    values = settings((weights, material[1]), tmp_path / "run", parallel, precision=precision)
    pool.run(save_step_0, parallel, values, data=data)
    main(tmp_path / "run/checkpoints/step-00000000", tmp_path / "back")
    source, back = WeightsFolder(weights), WeightsFolder(tmp_path / "back")
    assert back.provenance["sha256"] == source.provenance["sha256"]
    assert dataclasses.asdict(back.config) == dataclasses.asdict(source.config)
    assert back.vocabulary.sha256 == source.vocabulary.sha256
    assert verify(tmp_path / "back") == len(source.names)


def test_the_last_checkpoint_is_the_folder_that_the_run_wrote(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, data = LAYOUTS["tp2-pp2"]
    values = settings(material, tmp_path / "run", parallel)
    pool.run(run_training, parallel, values, data=data)
    path = tmp_path / "run/checkpoints/step-00000004"
    export_checkpoint(path, tmp_path / "exported")
    written = WeightsFolder(tmp_path / "run/weights").provenance
    assert WeightsFolder(tmp_path / "exported").provenance == written
    assert written["steps"] == 4
    (path / "__0_0.distcp").unlink()
    with pytest.raises(UsageError, match=r"damaged checkpoint: .*__0_0\.distcp is missing"):
        export_checkpoint(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(UsageError, match="is no folder; name one such as"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "again")


def test_a_run_may_begin_from_an_exported_checkpoint(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    values = settings(material, tmp_path / "run", ParallelConfig(), stop_at=1)
    pool.run(run_training, ParallelConfig(), values)
    export_checkpoint(tmp_path / "run/checkpoints/step-00000001", tmp_path / "exported")
    new = settings((tmp_path / "exported", material[1]), tmp_path / "new", ParallelConfig())
    pool.run(run_training, ParallelConfig(), new)
    assert WeightsFolder(tmp_path / "new/weights").provenance["parent"].endswith("exported")
