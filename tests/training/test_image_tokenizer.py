import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.image import pixels_from_image
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from megatron_jam.training import image_tokenizer as training
from megatron_jam.training.image_tokenizer import train_image_tokenizer
from tests.helpers.commands import failure, run_tool

CONFIG = VqConfig(image_size=32, channels=(16, 32), num_codes=64, code_dim=8)
SETTINGS = {"batch_size": 8, "learning_rate": 5e-3, "device": "cpu"}
TOOL = "train_image_tokenizer"


def picture(index: int) -> Image.Image:
    """A coloured disc on white, another size, place and colour for every index."""
    image = Image.new("RGB", (32, 32), "white")
    x, y, radius = 8 + 5 * (index % 4), 8 + 5 * (index // 4 % 4), 4 + index % 5
    colour = (37 * index % 256, 91 * index % 256, 151 * index % 256)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([pixels_from_image(picture(index), 32) for index in range(16)])


@pytest.fixture(scope="module")
def trained(images: torch.Tensor):
    return train_image_tokenizer(images, CONFIG, steps=500, seed=0, **SETTINGS)


def test_training_draws_the_pictures(images: torch.Tensor, trained) -> None:
    tokenizer, history = trained
    assert not tokenizer.training
    assert history[0].step == 5
    assert history[-1].step == 500
    assert len(history) == 100
    assert all(math.isfinite(record.loss) for record in history)
    assert history[-1].loss < 0.04 < 0.2 < history[0].loss
    drawn = tokenizer.decode(tokenizer.encode(images))
    assert 10 * torch.log10(4 / (drawn - images).square().mean()) > 23
    nearest = torch.cdist(drawn.flatten(1), images.flatten(1)).argmin(dim=1)
    assert nearest.tolist() == list(range(16))


def test_training_uses_the_codebook(images: torch.Tensor, trained) -> None:
    tokenizer, history = trained
    assert history[0].num_codes_used == 0  # no quantisation yet
    assert history[-1].num_codes_used >= 48
    assert len(tokenizer.encode(images).unique()) >= 48
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(64))


def test_training_depends_on_the_seed_alone(images: torch.Tensor) -> None:
    levels = ((images + 1) * 127.5).round().to(torch.uint8)
    first, again, other, of_levels = (
        train_image_tokenizer(pictures, CONFIG, steps=30, seed=seed, **SETTINGS)
        for pictures, seed in ((images, 1), (images, 1), (images, 2), (levels, 1))
    )
    weights = [tokenizer.state_dict() for tokenizer, _ in (first, again, other, of_levels)]
    assert first[1] == again[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["codebook"], weights[2]["codebook"])
    assert all(torch.equal(weights[0][name], weights[3][name]) for name in weights[0])


def test_a_code_out_of_use_starts_again_at_a_feature(images: torch.Tensor) -> None:
    tokenizer = VqTokenizer(CONFIG)
    codebook = training._MovingCodebook(tokenizer, images, batch_size=8, seed=0)
    features = tokenizer.features(images).flatten(0, 1).detach()
    far = -torch.nn.functional.normalize(features.mean(dim=0), dim=0)
    codebook.sums[5], codebook.counts[5] = far, 0.0
    assert codebook.num_used() < 64
    codebook.revive(images, seed=0, step=20)
    assert codebook.num_used() == 64
    codebook.update(tokenizer.features(images), tokenizer.encode(images))
    assert (features @ tokenizer.codebook[5]).max() > 0.95


@pytest.mark.parametrize("name", ["steps", "batch_size", "learning_rate"])
def test_settings_that_cannot_be_are_named(images: torch.Tensor, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        train_image_tokenizer(images, CONFIG, **{"steps": 2, "seed": 0, **SETTINGS, name: 0})
    with pytest.raises(UsageError, match="images"):
        train_image_tokenizer(images[:0], CONFIG, steps=2, seed=0, **SETTINGS)


def test_tool(tmp_path: Path) -> None:
    for name, indices in (("pairs", range(16)), ("heldout", range(16, 20))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for index in indices:
                picture(index).save(tmp_path / f"disc-{index:02}.png")
                archive.add(tmp_path / f"disc-{index:02}.png", f"disc-{index:02}.png")
    output = tmp_path / "tokenizer"
    options = ["--steps", "20", "--image_size", "32", "--channels", "[8,16]", "--num_codes", "32"]
    run_tool(
        TOOL, tmp_path / "pairs.tar", output, "--validation", tmp_path / "heldout.tar", *options
    )
    tokenizer = load_image_tokenizer(output)
    assert (tokenizer.image_size, tokenizer.num_codes) == (32, 32)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["training"]["num_pictures"] == 16
    assert metrics["validation"]["num_pictures"] == 4
    assert metrics["training"]["psnr"] > 5
    assert json.loads((output / "history.json").read_text())[-1]["step"] == 20
    # Two rows of two for the training pictures, one of two for the others.
    assert Image.open(output / "reconstructions.png").size == (12 * 32, 6 * 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: no such file or folder: {0}/pairs.tar"),
        (
            ["--image_size", "60"],
            "error: image_size 60 is not a multiple of 8, the downsampling that patch_size and "
            "channels make",
        ),
        (["--seed", "-1"], "error: seed must be at least 0, not -1"),
        (["--image_size", "0"], "error: image_size must be at least 1, not 0"),
        (["--channels", "[]"], "error: channels must be one or more positive numbers, not ()"),
    ],
)
def test_tool_ends_with_one_line_on_a_mistake(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = failure(capsys, TOOL, tmp_path / "pairs.tar", tmp_path / "out", *options)
    assert told.splitlines() == [message.format(tmp_path)]


def test_tool_names_a_record_without_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sun.png").write_text("no picture")
    for name, archived in (("text", "sun.txt"), ("broken", "sun.png")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / "sun.png", archived)
        told = failure(capsys, TOOL, tmp_path / f"{name}.tar", tmp_path / "out")
        assert f"{name}.tar: record 'sun'" in told
    assert not (tmp_path / "out").exists()


def test_tool_trains_for_no_folder_that_it_cannot_replace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    told = failure(capsys, TOOL, tmp_path / "pairs.tar", tmp_path)  # before pictures are missed
    assert "no model.safetensors: name another folder" in told
