import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.image import image_from_pixels, pixels_from_image
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer

CONFIG = VqConfig(image_size=32, patch_size=2, channels=(8, 16), num_codes=40, code_dim=6)


@pytest.fixture
def tokenizer() -> VqTokenizer:
    return VqTokenizer(CONFIG, seed=3).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_and_ranges(tokenizer: VqTokenizer, pixels: torch.Tensor) -> None:
    assert (tokenizer.num_codes, tokenizer.tokens_per_image, tokenizer.image_size) == (40, 64, 32)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (5, 64)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 40
    assert len(codes.unique()) > 5
    drawn = tokenizer.decode(codes)
    assert drawn.shape == pixels.shape
    assert drawn.dtype == torch.float32
    assert drawn.abs().max() <= 1


@pytest.mark.parametrize(
    ("channels", "patch_size", "tokens"), [((8,), 8, 16), ((8, 8, 8), 2, 16), ((8, 12), 1, 256)]
)
def test_downsampling_is_patch_size_and_levels(
    channels: tuple[int, ...], patch_size: int, tokens: int
) -> None:
    config = VqConfig(image_size=32, patch_size=patch_size, channels=channels)
    tokenizer = VqTokenizer(config)
    codes = tokenizer.encode(torch.zeros(2, 3, 32, 32))
    assert codes.shape == (2, tokens)
    assert tokenizer.decode(codes).shape == (2, 3, 32, 32)


def test_codes_do_not_depend_on_the_batch(tokenizer: VqTokenizer, pixels: torch.Tensor) -> None:
    codes = tokenizer.encode(pixels)
    alone = torch.cat([tokenizer.encode(pixels[i : i + 1]) for i in range(5)])
    assert torch.equal(codes, alone)
    assert torch.equal(codes, tokenizer.encode(pixels))
    assert torch.equal(tokenizer.encode(pixels.flip(0)), codes.flip(0))


def test_a_code_sits_where_its_square_is(tokenizer: VqTokenizer) -> None:
    # A square of 4 x 4 pixels in the grid's row 5, column 2; the rest is white.
    white = torch.ones(1, 3, 32, 32)
    black_square = white.clone()
    black_square[..., 20:24, 8:12] = -1
    codes, changed = tokenizer.encode(white)[0], tokenizer.encode(black_square)[0]
    assert codes[5 * 8 + 2] != changed[5 * 8 + 2]
    assert codes[7 * 8 + 7] == changed[7 * 8 + 7]
    difference = tokenizer.features(black_square)[0] - tokenizer.features(white)[0]
    moved = difference.norm(dim=-1).detach().reshape(8, 8)
    moved = moved / moved.sum()
    assert float(moved.sum(dim=1) @ torch.arange(8.0)) == pytest.approx(5, abs=0.6)
    assert float(moved.sum(dim=0) @ torch.arange(8.0)) == pytest.approx(2, abs=0.6)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (VqTokenizer(CONFIG, seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["codebook"], other["codebook"])
    assert not torch.equal(first["encoder.1.weight"], other["encoder.1.weight"])


def test_gradient_goes_straight_through(tokenizer: VqTokenizer, pixels: torch.Tensor) -> None:
    features = tokenizer.features(pixels)
    features.retain_grad()
    vectors = tokenizer.quantize(features, tokenizer.nearest_codes(features.detach()))
    vectors.retain_grad()
    tokenizer.pixels(vectors).square().mean().backward()
    assert torch.equal(features.grad, vectors.grad)
    assert tokenizer.encoder[1].weight.grad.abs().sum() > 0
    torch.testing.assert_close(vectors.detach(), tokenizer.codebook[tokenizer.encode(pixels)])
    torch.testing.assert_close(features.detach().norm(dim=-1), torch.ones(5, 64))


def test_nearest_code_is_the_nearest_by_distance(tokenizer: VqTokenizer) -> None:
    features = torch.nn.functional.normalize(torch.randn(50, 6), dim=-1)
    expected = torch.cdist(features, tokenizer.codebook).argmin(dim=-1)
    assert torch.equal(tokenizer.nearest_codes(features), expected)


def test_save_and_load(tokenizer: VqTokenizer, pixels: torch.Tensor, tmp_path) -> None:
    folder = tmp_path / "deep" / "tokenizer"
    VqTokenizer(CONFIG, seed=9).save(folder)
    tokenizer.save(folder)  # replaces the former whole
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]
    loaded = load_image_tokenizer(folder)
    assert loaded.config == CONFIG
    assert not loaded.training
    codes = tokenizer.encode(pixels)
    assert torch.equal(loaded.encode(pixels), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_save_replaces_no_other_folder(tokenizer: VqTokenizer, tmp_path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"not replaced, as it has files but no model.safetensors"):
        tokenizer.save(tmp_path)
    (tmp_path / "model.safetensors").write_text("of another library")
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(UsageError, match="is no image tokenizer's"):
        tokenizer.save(tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_sha256_is_of_what_makes_the_codes(tokenizer: VqTokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    assert load_image_tokenizer(tmp_path / "tokenizer").sha256 == tokenizer.sha256
    assert VqTokenizer(CONFIG, seed=3).sha256 == tokenizer.sha256
    strided = VqTokenizer(CONFIG, seed=3).to(memory_format=torch.contiguous_format)
    assert strided.sha256 == tokenizer.sha256
    others = [VqTokenizer(CONFIG, seed=4), VqTokenizer(CONFIG, seed=3)]
    others[1].codebook[0, 0] += 1e-6
    assert len({tokenizer.sha256, *(each.sha256 for each in others)}) == 3


def test_load_names_what_is_wrong(tokenizer: VqTokenizer, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"nowhere is no image tokenizer, it has no config.json"):
        load_image_tokenizer(tmp_path / "nowhere")
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    good = json.loads((folder / "config.json").read_text())

    def fails(text: str, match: str) -> None:
        (folder / "config.json").write_text(text)
        with pytest.raises(UsageError, match=match) as caught:
            load_image_tokenizer(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    fails("{", "config.json is no image tokenizer's")
    fails("[1]", "config.json is no image tokenizer's")
    fails(json.dumps({**good, "colour": 1}), "colour")
    fails(json.dumps({**good, "image_size": 33}), "image_size 33")
    fails(json.dumps({**good, "code_dim": "6"}), "config.json is no image tokenizer's")
    fails(json.dumps({**good, "num_codes": 41}), "model.safetensors does not fit .*codebook")
    fails(json.dumps({**good, "num_blocks": 2}), "model.safetensors does not fit")
    (folder / "config.json").write_text(json.dumps(good))
    weights = folder / "model.safetensors"
    save_file({**load_file(weights), "extra": torch.zeros(1)}, weights)
    with pytest.raises(UsageError, match=r"model.safetensors does not fit .*extra"):
        load_image_tokenizer(folder)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(UsageError, match=r"model.safetensors does not fit"):
        load_image_tokenizer(folder)
    weights.unlink()
    with pytest.raises(UsageError, match=r"no model.safetensors"):
        load_image_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_codes": 1}, "num_codes"),
        ({"channels": ()}, "channels"),
        ({"channels": (8, 0)}, "channels"),
        ({"patch_size": 0}, "patch_size"),
        ({"image_size": 60}, "image_size 60"),
    ],
)
def test_config_refuses(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VqConfig(**settings)


def test_wrong_shapes_and_codes_are_refused(tokenizer: VqTokenizer) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        tokenizer.encode(torch.zeros(1, 3, 32, 16))
    with pytest.raises(ValueError, match="codes must be"):
        tokenizer.decode(torch.zeros(1, 63, dtype=torch.int64))
    for code in (-1, 40):
        with pytest.raises(ValueError, match=r"codes must be in 0 \.\. 39"):
            tokenizer.decode(torch.full((1, 64), code))


def test_pixels_of_a_transparent_picture_are_on_white() -> None:
    array = np.zeros((4, 4, 4), dtype=np.uint8)
    array[:2] = (255, 0, 0, 255)  # the upper half is red, the lower one transparent black
    pixels = pixels_from_image(Image.fromarray(array), 4)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(pixels[:, 3, 3], torch.ones(3))


def test_pixels_are_the_middle_of_the_picture() -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((0, 255, 0), (10, 0, 30, 20))
    pixels = pixels_from_image(image, 10)  # the filter rings at its edges
    assert pixels.shape == (3, 10, 10)
    green = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 10, 8)
    torch.testing.assert_close(pixels[:, :, 1:-1], green, atol=0.01, rtol=0)
    torch.testing.assert_close(
        pixels_from_image(image.rotate(90, expand=True), 10)[:, 1:-1],
        green.transpose(1, 2),
        atol=0.01,
        rtol=0,
    )


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "CMYK"])
def test_pixels_of_other_modes(mode: str) -> None:
    pixels = pixels_from_image(Image.new("RGB", (8, 8), "white").convert(mode), 8)
    torch.testing.assert_close(pixels, torch.ones(3, 8, 8), atol=0.02, rtol=0)


def test_image_from_pixels_is_the_inverse() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = image_from_pixels(pixels_from_image(Image.fromarray(array), 16))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), array)
    assert image_from_pixels(torch.full((3, 2, 2), 9.0)).getpixel((0, 0)) == (255, 255, 255)
