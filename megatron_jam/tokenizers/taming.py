"""The image tokenizers of taming-transformers (VQGAN, arXiv 2012.09841), from their own weights.

A convolutional encoder with attention at low resolutions, a codebook, and a decoder.
vqgan_gumbel_f8 (OpenImages) makes 1,024 codes of 8,192 of a picture of 256 x 256 pixels, as
Make-A-Scene's does, which was never released. Its code is the greatest of 8,192 logits (Gumbel
softmax, arXiv 1611.01144), that of the others the codebook's nearest row. Parameters have taming's
names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from megatron_jam.config.checks import check_types
from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.image import ImageTokenizer

_GROUPS, _EPSILON = 32, 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TamingConfig:
    """The shape of one of taming's tokenizers; by default that of vqgan_gumbel_f8."""

    image_size: int = 256
    """Height and width of a picture, in pixels (resolution)."""

    channels: int = 128
    """Channels of the first level (ch)."""

    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    """Channels of each level, over `channels`; every level after the first halves height and width
    (ch_mult)."""

    num_blocks: int = 2
    """Residual blocks of each level of the encoder; the decoder has one more (num_res_blocks)."""

    attention_sizes: tuple[int, ...] = (32,)
    """Heights at which attention follows each residual block (attn_resolutions)."""

    latent_dim: int = 256
    """Channels of the encoder's output (z_channels)."""

    code_dim: int = 256
    """Length of a code's vector (embed_dim)."""

    num_codes: int = 8192
    """Rows of the codebook (n_embed)."""

    quantizer: Literal["gumbel", "nearest"] = "gumbel"
    """gumbel: the greatest logit (GumbelVQ). nearest: the nearest row (VQModel)."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a setting that cannot be."""
        for name in ("multipliers", "attention_sizes"):  # JSON has lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        counts = ("image_size", "channels", "num_blocks", "latent_dim", "code_dim", "num_codes")
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UsageError(f"multipliers must be positive numbers, not {self.multipliers}")
        if self.channels % _GROUPS or self.image_size % 2 ** (len(self.multipliers) - 1):
            raise UsageError(
                f"channels {self.channels} must be a multiple of {_GROUPS}, and image_size "
                f"{self.image_size} one of {2 ** (len(self.multipliers) - 1)}"
            )

    @property
    def grid_size(self) -> int:
        """Codes along a side of a picture."""
        return self.image_size // 2 ** (len(self.multipliers) - 1)

    @classmethod
    def from_taming(cls, settings: Mapping[str, Any]) -> "TamingConfig":
        """Of a model.yaml of taming: its `model` with `target` and `params`.

        Raises:
            UsageError: it is of another kind of model, or has a setting that is not known here.
        """
        try:
            model = settings["model"]
            target, params = model["target"].rsplit(".", 1)[-1], model["params"]
            shape = params["ddconfig"]
            kinds: dict[str, Literal["gumbel", "nearest"]] = {
                "GumbelVQ": "gumbel",
                "VQModel": "nearest",
            }
            fixed = {"in_channels": 3, "out_ch": 3, "double_z": False, "dropout": 0.0}
            for name, value in fixed.items():
                if shape.get(name, value) != value:
                    raise UsageError(f"{name} is {shape[name]}; only {value} is known")
            return cls(
                image_size=shape["resolution"],
                channels=shape["ch"],
                multipliers=shape["ch_mult"],
                num_blocks=shape["num_res_blocks"],
                attention_sizes=shape["attn_resolutions"],
                latent_dim=shape["z_channels"],
                code_dim=params["embed_dim"],
                num_codes=params["n_embed"],
                quantizer=kinds[target],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"this is no model.yaml of taming's VQModel or GumbelVQ: {error!r}"
            ) from error


class TamingTokenizer(ImageTokenizer):
    """One of taming's tokenizers, for encoding and decoding alone; it begins with no weights."""

    kind: ClassVar[str] = "taming"
    config: TamingConfig

    def build(self, config: TamingConfig) -> None:
        """Make the layers."""
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv = nn.Conv2d(config.latent_dim, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_dim, 1)
        self.quantize = nn.Module()
        table = nn.Embedding(config.num_codes, config.code_dim)
        if config.quantizer == "gumbel":
            self.quantize.proj = nn.Conv2d(config.latent_dim, config.num_codes, 1)
            self.quantize.embed = table
        else:
            self.quantize.embedding = table

    @property
    def codebook(self) -> Tensor:
        """The codes' vectors [num_codes, code_dim]."""
        quantize = self.quantize
        is_gumbel = self.config.quantizer == "gumbel"
        return (quantize.embed if is_gumbel else quantize.embedding).weight

    def codes(self, pixels: Tensor) -> Tensor:
        """The codes of `pixels`."""
        grid = self.quant_conv(self.encoder(pixels))
        if self.config.quantizer == "gumbel":
            return self.quantize.proj(grid).argmax(dim=1).flatten(1)
        vectors = rearrange(grid, "b c h w -> b (h w) c")
        # Squared distances, less what is the same for all rows.
        return (self.codebook.square().sum(1) - 2 * vectors @ self.codebook.T).argmin(dim=-1)

    def drawn(self, codes: Tensor) -> Tensor:
        """The pixels of `codes`."""
        grid = rearrange(self.codebook[codes], "b (h w) c -> b c h w", h=self.config.grid_size)
        return self.decoder(self.post_quant_conv(grid))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=_EPSILON)


class _Residual(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.conv1 = nn.Conv2d(width, channels, 3, padding=1)
        self.norm2 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == channels else nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class _Attention(nn.Module):
    """One head over all places of the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class _Level(nn.Module):
    """Residual blocks, each followed by attention where the picture is small enough."""

    def __init__(self, width: int, channels: int, num_blocks: int, attends: bool) -> None:
        super().__init__()
        widths = [width, *[channels] * (num_blocks - 1)]
        self.block = nn.ModuleList(_Residual(each, channels) for each in widths)
        self.attn = nn.ModuleList(_Attention(channels) for _ in widths if attends)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


def _middle(channels: int) -> nn.Sequential:
    parts = nn.Sequential()
    parts.add_module("block_1", _Residual(channels, channels))
    parts.add_module("attn_1", _Attention(channels))
    parts.add_module("block_2", _Residual(channels, channels))
    return parts


class _Encoder(nn.Module):
    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width, size = config.channels, config.image_size
        for number, multiplier in enumerate(config.multipliers):
            if number:
                size //= 2
            channels = config.channels * multiplier
            attends = size in config.attention_sizes
            level = _Level(width, channels, config.num_blocks, attends)
            if number < len(config.multipliers) - 1:
                level.downsample = nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, 2)})
            self.down.append(level)
            width = channels
        self.mid = _middle(width)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, config.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for number, level in enumerate(self.down):
            x = level(x)
            if number < len(self.down) - 1:
                x = level.downsample["conv"](F.pad(x, (0, 1, 0, 1)))  # right and below alone
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        width = config.channels * config.multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_dim, width, 3, padding=1)
        self.mid = _middle(width)
        levels = []
        for number, multiplier in reversed(list(enumerate(config.multipliers))):
            channels = config.channels * multiplier
            attends = config.image_size // 2**number in config.attention_sizes
            level = _Level(width, channels, config.num_blocks + 1, attends)
            if number:
                level.upsample = nn.ModuleDict(
                    {"conv": nn.Conv2d(channels, channels, 3, padding=1)}
                )
            levels.append(level)
            width = channels
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for number, level in reversed(list(enumerate(self.up))):
            x = level(x)
            if number:
                x = level.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
