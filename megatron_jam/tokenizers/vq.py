"""A small vector-quantised autoencoder, as the quickstart trains one.

A convolutional encoder turns a picture into a grid of feature vectors, each is replaced by the
nearest row of a codebook (VQ-VAE, arXiv 1711.00937), and a decoder draws the picture back. Features
and codes are low-dimensional unit vectors, so that "nearest" is the greatest cosine and no code
falls out of use by its length (ViT-VQGAN, arXiv 2110.04627, section 3.2).
"""

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.image import ImageTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class VqConfig:
    """The shape of a :class:`VqTokenizer`."""

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


class VqTokenizer(ImageTokenizer):
    """Pictures to codes and back, trained by training/image_tokenizer.py."""

    kind: ClassVar[str] = "vq"
    config: VqConfig

    codebook: Tensor
    """Unit vectors [num_codes, code_dim]."""

    def __init__(self, config: VqConfig, *, seed: int = 0) -> None:
        """Build with fresh weights, a pure function of (config, seed), on the CPU."""
        super().__init__(config)
        self._reset_parameters(torch.Generator().manual_seed(seed))
        self.to(memory_format=torch.channels_last)  # three times as fast on a CPU

    def build(self, config: VqConfig) -> None:
        """Make the layers."""
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.register_buffer("codebook", torch.empty(config.num_codes, config.code_dim))

    def codes(self, pixels: Tensor) -> Tensor:
        """The codes of `pixels`."""
        return self.nearest_codes(self.features(pixels))

    def drawn(self, codes: Tensor) -> Tensor:
        """The pixels of `codes`."""
        return self.pixels(self.codebook[codes])

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


def _encoder(config: VqConfig) -> nn.Sequential:
    layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch_size)]
    width = 3 * config.patch_size**2
    for level, channels in enumerate(config.channels):
        stride = 2 if level else 1
        layers += [nn.Conv2d(width, channels, 3, stride, padding=1)]
        layers += [_ResidualBlock(channels) for _ in range(config.num_blocks)]
        width = channels
    return nn.Sequential(*layers, _ChannelNorm(width), nn.Conv2d(width, config.code_dim, 1))


def _decoder(config: VqConfig) -> nn.Sequential:
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
