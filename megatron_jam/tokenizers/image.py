"""Pictures as codes: what every image tokenizer is, its files, and pixels from and to PIL."""

import dataclasses
import hashlib
import json
import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_replaceable, replace_folder, temporary_name

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class ImageTokenizer(nn.Module):
    """Pictures to codes and back. A code's place in a row is its place in the grid, row by row.

    Everything is per picture: no statistic crosses the batch, and nothing is random.
    """

    kind: ClassVar[str]
    """What config.json calls it."""

    def __init__(self, config: Any) -> None:
        """Build on the CPU, the weights not set; `config` is a dataclass with image_size, grid_size
        and num_codes."""
        super().__init__()
        self.config = config
        with torch.device("meta"):  # so that the layers draw nothing from the global generator
            self.build(config)
        self.to_empty(device="cpu")

    @abstractmethod
    def build(self, config: Any) -> None:
        """Make the layers."""

    @abstractmethod
    def codes(self, pixels: Tensor) -> Tensor:
        """Codes [B, tokens_per_image] of `pixels` [B, 3, H, W]."""

    @abstractmethod
    def drawn(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], not clamped, of `codes` [B, tokens_per_image]."""

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
        return self.codes(pixels)

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
        return self.drawn(codes).clamp(-1, 1)

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
        config = json.dumps({"kind": self.kind, **dataclasses.asdict(self.config)}, indent=2) + "\n"
        (new / CONFIG_FILE).write_text(config, encoding="utf-8")
        tensors = {name: t.cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, new / WEIGHTS_FILE)
        replace_folder(new, folder, marker=WEIGHTS_FILE)

    def take(self, tensors: dict[str, Tensor], source: str) -> None:
        """Take weights by name; `source` is for messages.

        Raises:
            UsageError: one is missing, unknown or of another shape.
        """
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"{source} does not fit {CONFIG_FILE}: {reason}") from error


def check_output(folder: Path) -> None:
    """Raise :class:`UsageError` unless an image tokenizer can be saved to `folder`: call before
    training. What may stand there is another image tokenizer."""
    check_replaceable(folder, WEIGHTS_FILE)
    if (folder / WEIGHTS_FILE).is_file():  # a model of another library may have such a file
        read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """What the config.json of an image tokenizer says.

    Raises:
        UsageError: it is none's.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not {"image_size", "num_codes"} <= set(values):
            raise ValueError("it has no image_size or no num_codes")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is no image tokenizer's: {error}") from error
    return values


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
