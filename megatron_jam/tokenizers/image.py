"""Pictures as codes: a small vector-quantised autoencoder, its files, and pixels from and to PIL.

A convolutional encoder turns a picture into a grid of feature vectors, each is replaced by the
nearest row of a codebook (VQ-VAE, arXiv 1711.00937), and a decoder draws the picture back. Features
and codes are low-dimensional unit vectors, so that "nearest" is the greatest cosine and no code
falls out of use by its length (ViT-VQGAN, arXiv 2110.04627, section 3.2).
"""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_replaceable, replace_folder, temporary_name

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
    """The shape of an image tokenizer."""

    image_size: int = 64
    """Height and width of a picture, in pixels."""

    patch_size: int = 4
    """Side of the pixel square folded into channels before the first convolution, and unfolded
    after the last: convolutions at full resolution would cost most of the time."""

    channels: tuple[int, ...] = (32, 128)
    """Channels of each level; every level after the first halves the height and width."""

    num_blocks: int = 1
    """Residual blocks of each level, in the encoder and in the decoder."""

    num_codes: int = 512
    """Rows of the codebook."""

    code_dim: int = 16
    """Length of a feature vector and of a code."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a setting that cannot be."""
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists only
        for name in ("image_size", "patch_size", "num_blocks", "code_dim"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_codes < 2:
            raise UsageError(f"num_codes must be at least 2, not {self.num_codes}")
        if not self.channels or min(self.channels) < 1:
            raise UsageError(f"channels must be one or more positive numbers, not {self.channels}")
        if self.image_size % self.downsampling:
            raise UsageError(
                f"image_size {self.image_size} is not a multiple of {self.downsampling}, "
                f"the downsampling that patch_size and channels make"
            )

    @property
    def downsampling(self) -> int:
        """Pixels along the side of the square that one code stands for."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def grid_size(self) -> int:
        """Codes along a side of a picture."""
        return self.image_size // self.downsampling


class ImageTokenizer(nn.Module):
    """Pictures to codes and back. A code's place in a row is its place in the grid, row by row.

    Everything is per picture: no statistic crosses the batch, and nothing is random.
    """

    codebook: Tensor
    """Unit vectors [num_codes, code_dim]."""

    def __init__(self, config: ImageTokenizerConfig, *, seed: int = 0) -> None:
        """Build with fresh weights, a pure function of (config, seed), on the CPU."""
        super().__init__()
        self.config = config
        with torch.device("meta"):  # so that the layers draw nothing from the global generator
            self.encoder = _encoder(config)
            self.decoder = _decoder(config)
            self.register_buffer("codebook", torch.empty(config.num_codes, config.code_dim))
        self.to_empty(device="cpu")
        self._reset_parameters(torch.Generator().manual_seed(seed))
        self.to(memory_format=torch.channels_last)  # three times as fast on a CPU

    @property
    def num_codes(self) -> int:
        """Rows of the codebook: codes are 0 .. num_codes - 1."""
        return self.config.num_codes

    @property
    def tokens_per_image(self) -> int:
        """Codes of one picture."""
        return self.config.grid_size**2

    @property
    def image_size(self) -> int:
        """Height and width of a picture, in pixels."""
        return self.config.image_size

    @property
    def sha256(self) -> str:
        """Of configuration and tensors: equal for tokenizers that give equal codes, wherever they
        are and however often they were saved."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config)).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64 [B, tokens_per_image] of `pixels` float32 [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: `pixels` has another shape.
        """
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be [B, 3, {size}, {size}], not {list(pixels.shape)}")
        return self.nearest_codes(self.features(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels float32 [B, 3, H, W] in [-1, 1] of `codes` int64 [B, tokens_per_image].

        Raises:
            ValueError: `codes` has another shape, or a code is not in 0 .. num_codes - 1.
        """
        if codes.ndim != 2 or codes.shape[1] != self.tokens_per_image:
            raise ValueError(f"codes must be [B, {self.tokens_per_image}], not {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise ValueError(f"codes must be in 0 .. {self.num_codes - 1}")
        return self.pixels(self.codebook[codes]).clamp(-1, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, tokens_per_image, code_dim], before quantisation."""
        grid = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return F.normalize(rearrange(grid, "b c h w -> b (h w) c"), dim=-1)

    def nearest_codes(self, features: Tensor) -> Tensor:
        """The code [...] of the greatest cosine with each of `features` [..., code_dim]."""
        return (features @ self.codebook.T).argmax(dim=-1)

    def quantize(self, features: Tensor, codes: Tensor) -> Tensor:
        """The codebook's vectors, with the gradient passed straight through to `features`."""
        return features + (self.codebook[codes] - features).detach()

    def pixels(self, vectors: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], not clamped, of `vectors` [B, tokens_per_image, code_dim]."""
        grid = rearrange(vectors, "b (h w) c -> b c h w", h=self.config.grid_size)
        grid = grid * self.config.code_dim**0.5  # unit variance, not unit length
        return self.decoder(grid.contiguous(memory_format=torch.channels_last))

    def save(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors; `folder` appears whole or not at all.

        Raises:
            UsageError: `folder` is in use for something else (:func:`check_output`).
        """
        folder = Path(folder)
        check_output(folder)
        new = temporary_name(folder)
        shutil.rmtree(new, ignore_errors=True)  # a killed run's
        new.mkdir(parents=True)
        config = json.dumps(dataclasses.asdict(self.config), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(config, encoding="utf-8")
        tensors = {name: t.cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, new / WEIGHTS_FILE)
        replace_folder(new, folder, marker=WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: Path | str) -> "ImageTokenizer":
        """The tokenizer that :meth:`save` wrote, on the CPU, in evaluation mode.

        Raises:
            UsageError: a file is missing, or does not hold an image tokenizer.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise UsageError(
                    f"{folder} is no image tokenizer, it has no {name}: "
                    f"make one with tools/train_image_tokenizer.py"
                )
        tokenizer = cls(_read_config(folder))
        try:
            tokenizer.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {reason}"
            ) from error
        return tokenizer.eval()

    @torch.no_grad()
    def _reset_parameters(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                bound = math.sqrt(3 / parameter[0].numel())  # unit gain
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for module in self.modules():
            if isinstance(module, _ResidualBlock):
                module.project.weight.zero_()  # a fresh block is the identity
        self.codebook.copy_(F.normalize(torch.randn(self.codebook.shape, generator=generator)))


def check_output(folder: Path) -> None:
    """Raise :class:`UsageError` unless an image tokenizer can be saved to `folder`: call before
    training. What may stand there is another image tokenizer."""
    check_replaceable(folder, WEIGHTS_FILE)
    if (folder / WEIGHTS_FILE).is_file():  # a model of another library may have such a file
        _read_config(folder)


def _read_config(folder: Path) -> ImageTokenizerConfig:
    path = folder / CONFIG_FILE
    try:
        return ImageTokenizerConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is no image tokenizer's: {error}") from error


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of each place: unlike group norm it moves nothing over the
    picture, so that equal surroundings get equal codes wherever they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _ChannelNorm(channels)
        self.expand = nn.Conv2d(channels, channels, 3, padding=1)
        self.project = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.silu(self.expand(self.norm(x))))


def _encoder(config: ImageTokenizerConfig) -> nn.Sequential:
    layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch_size)]
    width = 3 * config.patch_size**2
    for level, channels in enumerate(config.channels):
        stride = 2 if level else 1
        layers += [nn.Conv2d(width, channels, 3, stride, padding=1)]
        layers += [_ResidualBlock(channels) for _ in range(config.num_blocks)]
        width = channels
    return nn.Sequential(*layers, _ChannelNorm(width), nn.Conv2d(width, config.code_dim, 1))


def _decoder(config: ImageTokenizerConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = config.code_dim
    for level, channels in reversed(list(enumerate(config.channels))):
        last = level == len(config.channels) - 1
        if last:
            layers += [nn.Conv2d(width, channels, 3, padding=1)]
        else:
            layers += [nn.Conv2d(width, 4 * channels, 1), nn.PixelShuffle(2)]
        layers += [_ResidualBlock(channels) for _ in range(config.num_blocks)]
        width = channels
    patch = 3 * config.patch_size**2
    to_pixels = nn.Conv2d(width, patch, 3, padding=1)
    return nn.Sequential(
        *layers, _ChannelNorm(width), nn.SiLU(), to_pixels, nn.PixelShuffle(config.patch_size)
    )


def levels_from_image(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Red, green and blue, uint8 [size, size, 3], of a picture of any size and mode.

    Transparent parts become white; the shorter side is resized to `size`, the middle is kept.
    """
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def pixels_from_levels(levels: NDArray[np.uint8]) -> Tensor:
    """Pixels float32 [..., 3, size, size] in [-1, 1] of `levels` uint8 [..., size, size, 3]."""
    array = levels.astype(np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, -3)))


def pixels_from_image(image: Image.Image, size: int) -> Tensor:
    """Pixels float32 [3, size, size] in [-1, 1] of a picture (:func:`levels_from_image`)."""
    return pixels_from_levels(levels_from_image(image, size))


def image_from_pixels(pixels: Tensor) -> Image.Image:
    """The RGB picture of `pixels` float [3, H, W] in [-1, 1]; values beyond are clipped."""
    levels = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return Image.fromarray(levels.permute(1, 2, 0).to(torch.uint8).numpy())
