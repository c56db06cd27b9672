"""Texts and captions are measured as the sets that tools would prepare of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.indexed import open_set, write_set
from megatron_jam.data.prepare.pictures import EncodingConfig
from megatron_jam.evaluation.perplexity import measure_folder
from megatron_jam.evaluation.sources import (
    PictureConfig,
    coco_captions,
    prepared_sets,
    scratch_folder,
    weights_of,
)
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.document import caption_image_document, text_document
from megatron_jam.tokenizers.image import pixels_from_image
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from megatron_jam.training.checkpoint import complete_checkpoints
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import pico_config, pico_folder, pico_tokenizer, pico_vocabulary
from tests.helpers.pool import WorkerPool
from tests.helpers.training import run_material, run_training, settings

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "a strawberry"]
CODES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 15]]
PICTURES = PictureConfig(image_tokenizer="somebody", encoding=EncodingConfig(codes_per_image=4))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, files of texts and of captions, and the sets that they should become."""
    root = tmp_path_factory.mktemp("sources")
    pico_folder(root / "weights", pico_config("cross"), dtype=torch.float32)
    vocabulary, tokenizer = pico_vocabulary(), pico_tokenizer()
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    pairs = [{"caption": t, "codes": c} for t, c in zip(TEXTS, CODES, strict=True)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    ids = [tokenizer.encode(text) for text in TEXTS]
    documents = {
        "texts": [text_document(vocabulary, each) for each in ids],
        "pairs": [
            caption_image_document(vocabulary, each, np.array(codes))
            for each, codes in zip(ids, CODES, strict=True)
        ],
    }
    for name, each in documents.items():
        write_set(
            root / name,
            each,
            vocabulary=vocabulary,
            tokenizer_sha256=tokenizer.sha256,
            kind="text" if name == "texts" else "pairs",
            image_tokenizer_sha256="" if name == "texts" else "1" * 64,
        )
    return root


def measure(world: World, root: Path, weights: Path, paths: dict[str, str]) -> Any:
    sets = [DataSetConfig(name=name, path=path) for name, path in paths.items()]
    with scratch_folder(None, world) as scratch:
        with weights_of(weights, scratch, world) as folder:
            ready = prepared_sets(sets, WeightsFolder(folder), PICTURES, scratch, world)
            found = measure_folder(folder, ready, world, context_length=32, micro_batch_size=2)
        left = scratch
        assert world.rank or folder.exists() == (folder == weights), "only an export goes"
    assert world.rank or not left.exists()
    return {name: (each.mean, each.by_modality(), each.tokens()) for name, each in found.items()}


@pytest.mark.parametrize(
    ("parallel", "data"), [(ParallelConfig(), 1), (ParallelConfig(tensor=2), 1)], ids=["one", "tp2"]
)
def test_files_are_measured_as_prepared_sets(
    pool: WorkerPool, root: Path, parallel: ParallelConfig, data: int
) -> None:
    files = {"texts": str(root / "texts.jsonl"), "pairs": str(root / "pairs.jsonl")}
    sets = {name: str(root / name) for name in files}
    due = pool.run(measure, ParallelConfig(), root, root / "weights", sets)[0]
    found = pool.run(measure, parallel, root, root / "weights", files, data=data)[0]
    assert due["pairs"][2]["image"] == 12
    for name, (mean, by_modality, tokens) in due.items():
        assert found[name][0] == pytest.approx(mean, rel=1e-5)
        assert found[name][1] == pytest.approx(by_modality, rel=1e-5)
        assert found[name][2] == tokens


def test_a_checkpoint_is_measured_as_the_weights_that_it_holds(
    pool: WorkerPool, root: Path, tmp_path: Path
) -> None:
    material = run_material(tmp_path)
    values = settings(material, tmp_path / "run", ParallelConfig(tensor=2))
    pool.run(run_training, ParallelConfig(tensor=2), values)
    (path, *_) = reversed(complete_checkpoints(tmp_path / "run" / "checkpoints"))
    sets = {"set": str(material[1])}
    one = pool.run(measure, ParallelConfig(), root, path, sets)[0]
    other = pool.run(measure, ParallelConfig(), root, tmp_path / "run" / "weights", sets)[0]
    assert one == other


def coco(root: Path, **changes: Any) -> Path:
    values = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 5, "file_name": "a.jpg"}],
        "annotations": [
            {"image_id": 5, "caption": "first of a "},
            {"image_id": 7, "caption": "first of b"},
            {"image_id": 5, "caption": "second of a"},
        ],
        **changes,
    }
    path = root / "captions.json"
    path.write_text(json.dumps(values))
    return path


def test_coco(tmp_path: Path) -> None:
    path = coco(tmp_path)
    folder = tmp_path.resolve()
    assert coco_captions(path, PictureConfig()) == [
        {"caption": "first of b", "image": str(folder / "b.jpg")},
        {"caption": "first of a", "image": str(folder / "a.jpg")},
    ]
    both = coco_captions(path, PictureConfig(captions_per_image=2, folder=Path("/pictures")))
    assert [each["caption"] for each in both] == ["first of b", "first of a", "second of a"]
    assert both[0]["image"] == "/pictures/b.jpg"


def documents_of(world: World, root: Path, path: Path, images: Path, scratch: Path) -> Any:
    sets = [DataSetConfig(name="coco", path=str(path))]
    folder = WeightsFolder(root / "weights")
    pictures = PictureConfig(image_tokenizer=str(images))
    (made,) = prepared_sets(sets, folder, pictures, scratch, world)
    found = open_set(made.path, folder.vocabulary)
    return [found.document(number).tolist() for number in range(found.num_documents)]


def test_coco_with_its_pictures(pool: WorkerPool, root: Path, tmp_path: Path) -> None:
    """Files of pictures get the image tokenizer's codes, behind their captions."""
    shape = VqConfig(image_size=8, patch_size=4, channels=(4,), num_codes=16, code_dim=4)
    images = VqTokenizer(shape, seed=0)
    images.save(tmp_path / "images")
    rng = np.random.default_rng(0)
    due, vocabulary, tokenizer = [], pico_vocabulary(), pico_tokenizer()
    for name in "ba":  # in the order of the file's pictures
        levels = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{name}.jpg")
        with Image.open(tmp_path / f"{name}.jpg") as picture:
            (codes,) = images.encode(pixels_from_image(picture, 8)[None])
        caption = tokenizer.encode(f"first of {name}")
        due.append(caption_image_document(vocabulary, caption, codes.numpy()).tolist())
    args = (root, coco(tmp_path), tmp_path / "images", tmp_path)
    assert pool.run(documents_of, ParallelConfig(), *args) == [due]
    assert due[0][-5:] != due[1][-5:]


@pytest.mark.parametrize("changes", [{"images": None}, {"annotations": [{"image_id": 9}]}])
def test_what_is_not_cocos_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is no file of captions as COCO's"):
        coco_captions(coco(tmp_path, **changes), PictureConfig())


def no_tokenizer(world: World, root: Path) -> None:
    sets = [DataSetConfig(name="pairs", path=str(root / "pairs.jsonl"))]
    with scratch_folder(None, world) as scratch:
        folder = WeightsFolder(root / "weights")
        prepared_sets(sets, folder, PictureConfig(), scratch, world)


def test_pictures_need_a_tokenizer(pool: WorkerPool, root: Path) -> None:
    with pytest.raises(RuntimeError, match=r"give --pictures\.image_tokenizer"):
        pool.run(no_tokenizer, ParallelConfig(tensor=2), root)


def test_sets_are_what_tools_write(root: Path) -> None:
    assert open_set(str(root / "pairs"), pico_vocabulary()).info.kind == "pairs"
