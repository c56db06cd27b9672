"""tools/generate.py from a weights folder to a page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_jam.config.errors import UsageError
from megatron_jam.config.generation import SamplingConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from megatron_jam.weights.folder import PROVENANCE
from tests.generation.scenes import talkative_folder
from tools.generate import main

SAMPLING = SamplingConfig(max_new_tokens=12, seed=5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A weights folder and an image tokenizer of 16 codes, 4 a picture."""
    root = tmp_path_factory.mktemp("generate")
    image_tokenizer().save(root / "images")
    return str(talkative_folder(root / "weights", "cross")), str(root / "images")


def image_tokenizer(*, size: int = 8, num_codes: int = 16, seed: int = 0) -> VqTokenizer:
    config = VqConfig(image_size=size, patch_size=4, channels=(4,), num_codes=num_codes, code_dim=4)
    return VqTokenizer(config, seed=seed)


def test_questions_and_captions_become_a_page(inputs: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a red fruit\n\n  \na dog\n", encoding="utf-8")
    captions = {"captions": ["a fox"], "captions_file": str(tmp_path / "more.txt")}
    questions = [f"What is the fox {i}?" for i in range(5)]
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output, batch_size in zip(outputs, (2, 16), strict=True):
        main(
            *inputs,
            str(output),
            questions=questions,
            **captions,
            sampling=SAMPLING,
            batch_size=batch_size,
        )
    records = json.loads((outputs[0] / "documents.json").read_text(encoding="utf-8"))
    assert records["settings"]["guidance_scale"] == 3.5
    documents = records["documents"]
    assert [each["index"] for each in documents] == list(range(8))
    assert [each["prompt"] for each in documents[5:]] == ["a fox", "a red fruit", "a dog"]
    for each in documents[5:]:
        assert each["parts"] == [{"image": f"{each['index']:03d}-0.png"}]
        assert each["num_tokens"] == 5
    names = [part["image"] for each in documents for part in each["parts"] if "image" in part]
    assert len(names) > 3
    assert {path.name for path in outputs[0].glob("*")} == {
        *["index.html", "documents.json"],
        *names,
    }
    for name in names:  # the same whatever the batches were
        assert Image.open(outputs[0] / name).size == (8, 8)
        np.testing.assert_array_equal(*(np.asarray(Image.open(o / name)) for o in outputs))
    page = (outputs[0] / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(names)
    assert (outputs[1] / "index.html").read_text(encoding="utf-8") == page


def test_wrong_input_is_named(inputs: tuple[str, str], tmp_path: Path) -> None:
    weights, images = inputs
    image_tokenizer(num_codes=17).save(tmp_path / "more_codes")
    image_tokenizer(size=32).save(tmp_path / "large")
    cases = [
        ("nothing to write", (weights, images), {"questions": None}),
        ("not a weights folder", (images, images), {}),
        ("no image tokenizer", (weights, weights), {}),
        ("has 17 codes, the vocabulary of .* 16", (weights, str(tmp_path / "more_codes")), {}),
        (
            "max_positions 64 is too short for a picture of 64",
            (weights, str(tmp_path / "large")),
            {},
        ),
        ("prompt 1 is empty", (weights, images), {"questions": ["a", "  "]}),
        ("prompt 0 has .* shorten it", (weights, images), {"questions": ["9" * 200]}),
        ("batch_size must be", (weights, images), {"batch_size": 0}),
        ("parallel.tensor 2", (weights, images), {"parallel": ParallelConfig(tensor=2)}),
    ]
    for message, paths, changes in cases:
        with pytest.raises(UsageError, match=message):
            main(*paths, str(tmp_path / "out"), **{"questions": ["What?"], **changes})
        assert not (tmp_path / "out").exists()


def test_only_the_image_tokenizer_of_the_training_draws(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    weights, images = tmp_path / "weights", inputs[1]
    shutil.copytree(inputs[0], weights)
    provenance = json.loads((weights / PROVENANCE).read_text())
    options = {"captions": ["a fox"], "sampling": SAMPLING}
    for trained_with in ("", load_image_tokenizer(images).sha256):
        fields = {**provenance, "image_tokenizer_sha256": trained_with}
        (weights / PROVENANCE).write_text(json.dumps(fields))
        main(str(weights), images, str(tmp_path / "out"), **options)
    image_tokenizer(seed=1).save(tmp_path / "again")
    expected = r"is not the image tokenizer .* of the pictures that .*weights was trained on"
    with pytest.raises(UsageError, match=expected):
        main(str(weights), str(tmp_path / "again"), str(tmp_path / "out"), **options)


def test_a_file_of_prompts_that_is_no_text_is_named(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt is no text in utf-8"):
        main(*inputs, str(tmp_path / "out"), captions_file=str(tmp_path / "latin.txt"))
