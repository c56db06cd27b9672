"""A run draws its sheet at each validation; layouts that cannot are named."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_jam.config.errors import UsageError
from megatron_jam.config.generation import SamplingConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import RunConfig
from megatron_jam.config.sheet import SheetConfig
from megatron_jam.evaluation.sampled_sheet import SampledSheet
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pool import WorkerPool
from tests.helpers.training import (
    HALF,
    STEPS,
    build_training,
    losses,
    run_material,
    run_training,
    settings,
)

CAPTIONS = ["a fox", "a red fruit", "a dog", "the lazy dog", "a quick fox"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models and sets, and an image tokenizer of 16 codes, 4 a picture."""
    root = tmp_path_factory.mktemp("sheets")
    config = VqConfig(image_size=8, patch_size=4, channels=(4,), num_codes=16, code_dim=4)
    VqTokenizer(config, seed=0).save(root / "images")
    return run_material(root)


def drawn(world: World, values: dict[str, Any]) -> None:
    config = RunConfig(**values)
    build_training(world, values, [SampledSheet(config, writes=world.rank == 0)]).run()


def sheet(material: tuple[Path, Path]) -> SheetConfig:
    return SheetConfig(
        captions=CAPTIONS,
        image_tokenizer=str(material[0].with_name("images")),
        sampling=SamplingConfig(guidance_scale=2.0),
    )


def test_a_sheet_at_each_validation(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """And the run learns as it would without."""
    parallel = ParallelConfig(tensor=2)
    plain = settings(material, tmp_path / "plain", parallel, validate_every=HALF)
    values = {**plain, "output": tmp_path / "run", "sheet": sheet(material)}
    pool.run(drawn, parallel, values)
    pool.run(run_training, parallel, plain)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    names = [f"step-{step:08d}.png" for step in (HALF, STEPS)]
    assert sorted(p.name for p in (tmp_path / "run" / "sheets").iterdir()) == names
    pictures = [Image.open(tmp_path / "run" / "sheets" / name) for name in names]
    assert {picture.size for picture in pictures} == {(4 * 64, 2 * (64 + 16))}
    places = [(x * 64, y * 80 + 16, x * 64 + 64, y * 80 + 80) for y in (0, 1) for x in range(4)]
    colours = [len(pictures[0].crop(place).getcolors(4096)) for place in places]
    assert all(n > 1 for n in colours[:5])
    assert colours[5:] == [1, 1, 1], "there are five captions"
    assert (
        WeightsFolder(tmp_path / "run" / "weights").read("embedding.tokens.weight").isfinite().all()
    )


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(pipeline=2), ParallelConfig(tensor=2, sequence=True)]
)
def test_layouts_that_cannot_draw_are_named(
    material: tuple[Path, Path], tmp_path: Path, parallel: ParallelConfig
) -> None:
    values = settings(material, tmp_path, parallel, sheet=sheet(material))
    with pytest.raises(UsageError, match=r"sheet\.captions need parallel\.pipeline 1"):
        SampledSheet(RunConfig(**values), writes=True)


def test_captions_need_a_tokenizer() -> None:
    with pytest.raises(UsageError, match=r"need sheet\.image_tokenizer"):
        SheetConfig(captions=["a"])
