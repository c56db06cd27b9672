"""A run draws its sheet at each validation, as its exported weights draw it, under any layout."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.deepspeed import DeepSpeedConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.generation import SamplingConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import RunConfig
from megatron_jam.config.sheet import SheetConfig
from megatron_jam.evaluation.sampled_sheet import SampledSheet
from megatron_jam.generation import decoder
from megatron_jam.generation.documents import Illustrator
from megatron_jam.parallel.device import DTYPES
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from megatron_jam.training.metrics import read_metrics
from megatron_jam.training.stop import StopRequested
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pool import WorkerPool
from tests.helpers.training import (
    HALF,
    LAYOUTS,
    STEPS,
    build_training,
    forget_worlds,
    losses,
    run_material,
    run_training,
    settings,
)

CAPTIONS = ["a fox", "a red fruit", "a dog", "the lazy dog", "a quick fox"]
SAMPLING = SamplingConfig(guidance_scale=2.0)
PLACES = [(x * 64, y * 80 + 16, x * 64 + 64, y * 80 + 80) for y in (0, 1) for x in range(4)]
"""Of the pictures in a sheet: left, top, right, bottom."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models and sets, and an image tokenizer of 16 codes, 4 a picture."""
    root = tmp_path_factory.mktemp("sheets")
    tokenizer(seed=0).save(root / "images")
    return run_material(root)


@pytest.fixture
def zero_pool() -> Iterator[WorkerPool]:
    """Workers that end with the test: DeepSpeed keeps groups, and their threads, for good."""
    workers = WorkerPool()
    yield workers
    workers.close()


def tokenizer(*, seed: int, num_codes: int = 16) -> VqTokenizer:
    shape = {"image_size": 8, "patch_size": 4, "channels": (4,), "code_dim": 4}
    return VqTokenizer(VqConfig(num_codes=num_codes, **shape), seed=seed)


def sheet(material: tuple[Path, Path], **changes: Any) -> SheetConfig:
    images = str(material[0].with_name("images"))
    return SheetConfig(**{"captions": CAPTIONS, "image_tokenizer": images, **changes})


def drawn(world: World, values: dict[str, Any]) -> None:
    config = RunConfig(**values)
    if config.engine == "deepspeed":
        forget_worlds(world)
    build_training(world, values, [SampledSheet(config, writes=world.rank == 0)]).run()


def drawn_by_weights(world: World, output: Path, images: Path, precision: str) -> list[Any]:
    """Pixels of the pictures that a run's last weights draw, by what tools/generate.py calls."""
    folder, dtype = WeightsFolder(output / "weights"), DTYPES[precision]
    illustrator = Illustrator(folder, load_image_tokenizer(images), world, dtype=dtype)
    documents = illustrator.write(CAPTIONS, SAMPLING, kind="caption")
    return [np.asarray(picture.resize((64, 64), 0)) for each in documents for picture in each.parts]


def pictures_of(path: Path) -> list[Any]:
    with Image.open(path) as picture:
        return [np.asarray(picture.crop(place)) for place in PLACES[: len(CAPTIONS)]]


def check_drawing(
    pool: WorkerPool, material: tuple[Path, Path], output: Path, values: dict[str, Any], data: int
) -> None:
    """The last sheet of a run has the pictures of its exported weights, on one rank; in bf16, where
    sums over ranks round otherwise and now and then another code is drawn, under its layout."""
    pool.run(drawn, values["parallel"], values, data=data)
    images, precision = material[0].with_name("images"), values.get("precision", "fp32")
    stages = dataclasses.replace(values["parallel"], sequence=False)
    layout = stages if precision == "bf16" else ParallelConfig()
    due = pool.run(drawn_by_weights, layout, output, images, precision)[0]
    found = pictures_of(output / "sheets" / f"step-{STEPS:08d}.png")
    for one, other in zip(found, due, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({each.tobytes() for each in found}) > 1


def test_a_sheet_at_each_validation(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """And the run learns as it would without."""
    parallel = ParallelConfig(tensor=2)
    plain = settings(material, tmp_path / "plain", parallel, validate_every=HALF)
    values = {**plain, "output": tmp_path / "run", "sheet": sheet(material, sampling=SAMPLING)}
    check_drawing(pool, material, tmp_path / "run", values, 1)
    pool.run(run_training, parallel, plain)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    names = [f"step-{step:08d}.png" for step in (HALF, STEPS)]
    assert sorted(p.name for p in (tmp_path / "run" / "sheets").iterdir()) == names
    first, last = (pictures_of(tmp_path / "run" / "sheets" / name) for name in names)
    assert any((one != other).any() for one, other in zip(first, last, strict=True)), "it learns"
    with Image.open(tmp_path / "run" / "sheets" / names[0]) as picture:
        assert picture.size == (4 * 64, 2 * (64 + 16))
        colours = [len(picture.crop(place).getcolors(4096)) for place in PLACES]
    assert all(n > 1 for n in colours[:5])
    assert colours[5:] == [1, 1, 1], "there are five captions"
    assert (
        WeightsFolder(tmp_path / "run" / "weights").read("embedding.tokens.weight").isfinite().all()
    )


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("tp2-pp2", {"precision": "bf16"}),
        ("tp2-sp", {"recompute": "full", "dropout": 0.1}),
        pytest.param("pp2-dp2", {}, marks=pytest.mark.slow),
    ],
)
def test_a_layout_that_cannot_decode_by_itself(
    pool: WorkerPool,
    material: tuple[Path, Path],
    tmp_path: Path,
    layout: str,
    changes: dict[str, Any],
) -> None:
    """Stages, split sequences, dropout: the pictures are those of the exported weights."""
    parallel, data = LAYOUTS[layout]
    values = settings(material, tmp_path / "run", parallel, **changes)
    values["sheet"] = sheet(material, sampling=SAMPLING)
    check_drawing(pool, material, tmp_path / "run", values, data)


@pytest.mark.parametrize(
    "kind",
    [{"stage": 3, "keep_whole_below": 0}, pytest.param({"stage": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_deepspeed_draws(
    zero_pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path, kind: dict[str, Any]
) -> None:
    """Twice, and it goes on learning in between."""
    changes = {"engine": "deepspeed", "deepspeed": DeepSpeedConfig(**kind)}
    values = settings(material, tmp_path / "run", ParallelConfig(), **changes)
    values |= {"validate_every": HALF, "sheet": sheet(material, sampling=SAMPLING)}
    check_drawing(zero_pool, material, tmp_path / "run", values, 2)
    plain = {**values, "output": tmp_path / "plain", "sheet": SheetConfig()}
    zero_pool.run(drawn, ParallelConfig(), plain, data=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def stopped_while_drawing(world: World, values: dict[str, Any]) -> int:
    """A run that is told to stop while it draws its first sheet; how often it looked."""
    training = build_training(world, values, [SampledSheet(RunConfig(**values), writes=True)])
    looks = 0

    def poll(what: str, original: Any = training.poll) -> None:
        nonlocal looks
        if what.startswith("drawing"):
            looks += 1
            if looks == 2:
                (values["output"] / "stop").touch()
        original(what)

    training.poll = poll  # type: ignore[method-assign]
    with patch.object(decoder, "POLL_EVERY", 1), pytest.raises(StopRequested):
        training.run()
    return looks


def test_a_stop_in_the_midst_of_a_sheet_leaves_it_to_the_next_start(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """With its validation, which is reported once."""
    output = tmp_path / "run"
    values = settings(material, output, ParallelConfig(), validate_every=HALF)
    values["sheet"] = sheet(material, sampling=SAMPLING)
    assert pool.run(stopped_while_drawing, ParallelConfig(), values) == [2]
    assert not (output / "sheets").exists()
    assert (output / "requeue").read_text() == f"stopped at step {HALF} by {output / 'stop'}\n"
    pool.run(drawn, ParallelConfig(), values)
    assert len(list((output / "sheets").iterdir())) == 2
    lines = [x for x in read_metrics(output / "metrics.jsonl") if x["kind"] == "validation"]
    assert [line["step"] for line in lines] == [HALF, STEPS]


def refusal(world: World, values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as told:
        drawn(world, values)
    return str(told.value)


def test_another_image_tokenizer_is_named(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    tokenizer(seed=0, num_codes=8).save(tmp_path / "other")
    other = sheet(material, image_tokenizer=str(tmp_path / "other"))
    values = settings(material, tmp_path / "run", ParallelConfig(), sheet=other)
    (told,) = pool.run(refusal, ParallelConfig(), values)
    assert "sheet.image_tokenizer has 8 codes, the vocabulary of" in told


def test_the_image_tokenizer_of_the_data_is_due(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """With as many codes, each of which is another picture."""
    due, other = tokenizer(seed=0), tokenizer(seed=1)
    other.save(tmp_path / "other")
    data = material[1]
    sets = [DataSetConfig(name="set", path=str(tmp_path / "set"))]
    for suffix in (".bin", ".idx"):
        shutil.copy(data.with_suffix(suffix), tmp_path / f"set{suffix}")
    info = json.loads(data.with_suffix(".json").read_text())
    info["image_tokenizer_sha256"] = due.sha256
    (tmp_path / "set.json").write_text(json.dumps(info))
    shown = sheet(material, image_tokenizer=str(tmp_path / "other"))
    values = settings(material, tmp_path / "run", ParallelConfig(), sheet=shown)
    values["data"] = dataclasses.replace(values["data"], sets=sets)
    (told,) = pool.run(refusal, ParallelConfig(), values)
    assert told == (
        f"sheet.image_tokenizer ({other.sha256[:12]}) is not the image tokenizer"
        f" ({due.sha256[:12]}) of data.sets; give that one"
    )


def test_captions_need_a_tokenizer() -> None:
    with pytest.raises(UsageError, match=r"need sheet\.image_tokenizer"):
        SheetConfig(captions=["a"])
