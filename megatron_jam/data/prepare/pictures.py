"""Pictures of records: files to be encoded, or codes that were made elsewhere."""

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare.records import BadRecord, Record
from megatron_jam.tokenizers.image import ImageTokenizer, levels_from_image, pixels_from_levels
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary

Picture = NDArray[np.uint8] | NDArray[np.int64]
"""Levels uint8 [size, size, 3] of a picture that is to be encoded, or its codes int64 [n]."""

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
"""Of picture files in a .tar."""

MAX_PIXELS = 1 << 26
"""A picture of more is bad: it would take gigabytes to decode, and some are made for that."""

_IMAGE_FIELDS = (*IMAGE_EXTENSIONS, "image", "file_name")
_METASEQ = re.compile(r'\s*<img alt="(.*)" src="([^"]*)">\s*', re.DOTALL)


def picture_of(record: Record, fields: dict[str, Any], size: int | None) -> Picture:
    """The picture of a record, to be encoded at `size` pixels, or its codes.

    Codes are a list, or a text such as "I5 I81", in field "codes". A picture is the content of a
    file, or the name of one beside the input.

    Raises:
        BadRecord: there is none, none that can be read, or `size` is None and there are no codes.
    """
    if fields.get("codes") is not None:
        return read_codes(fields["codes"], record.where)
    value = next((fields[e] for e in _IMAGE_FIELDS if fields.get(e) is not None), None)
    if value is None:
        wanted = ", ".join((*_IMAGE_FIELDS, "codes"))
        raise BadRecord(record.where, f"it has no picture ({wanted})")
    if size is None:
        raise BadRecord(record.where, "it has a picture where codes are needed")
    return decode_picture(value, record, size)


def decode_picture(value: Any, record: Record, size: int) -> NDArray[np.uint8]:
    """Levels uint8 [size, size, 3] of a picture file: its content, its name, or a row
    {"bytes": content, "path": name}, as tables of Hugging Face have it.

    Raises:
        BadRecord: it cannot be read, or is too large.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    try:
        if isinstance(value, bytes):
            return _levels(io.BytesIO(value), size)
        if isinstance(value, str):
            return _levels(Path(record.place).parent / value, size)
        raise ValueError(f"{type(value).__name__} is neither a file's content nor a name")
    # What decoders raise for damaged files has no common class.
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
        reason = f"the picture cannot be read ({error})"
    except (Image.DecompressionBombError, IndexError, KeyError, TypeError, AttributeError) as error:
        reason = f"the picture cannot be read ({type(error).__name__}: {error})"
    raise BadRecord(record.where, reason)


def _levels(file: io.BytesIO | Path, size: int) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused below
        opened = Image.open(file)
    with opened as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        return levels_from_image(image, size)


def read_codes(value: Any, where: str) -> NDArray[np.int64]:
    """Codes int64 [n] of a list of integers, or of a text such as "I5 I81" or "5 81".

    Raises:
        BadRecord: it is neither.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        value = [each.removeprefix("I") for each in value.split()]
        if all(each.isdecimal() for each in value):
            value = [int(each) for each in value]
    array = np.asarray(value) if isinstance(value, list | tuple | np.ndarray) else np.zeros(0)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise BadRecord(where, "the codes are no list of whole numbers")
    return array.astype(np.int64)


def split_metaseq(text: str) -> tuple[str, str] | None:
    """Caption and codes of `<img alt="caption" src="I5 I81 ...">`, as metaseq stores a pair; None
    for any other text."""
    found = _METASEQ.fullmatch(text)
    return (found[1], found[2]) if found else None


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """How a tool encodes pictures."""

    batch_size: int = 64
    """Records, and pictures, worked on at a time."""

    device: str | None = None
    """Where pictures are encoded, such as cuda:1 or cpu; by default a GPU if there is one."""

    codes_per_image: int | None = None
    """Codes of a picture, where all are made elsewhere and image_tokenizer is a mere name."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.codes_per_image is not None and self.codes_per_image < 1:
            raise UsageError(f"codes_per_image must be at least 1, not {self.codes_per_image}")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device must be cpu, cuda or cuda:N, not {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class ImageEncoding:
    """How pictures become codes."""

    tokenizer: ImageTokenizer | None
    """On its device; None if all pictures come as codes."""

    sha256: str
    """`ImageTokenizer.sha256`, or of the name of what made the codes."""

    num_codes: int
    """Codes of a picture."""

    range: int
    """Codes are 0 .. range - 1."""

    batch_size: int = 64
    """Pictures encoded at once."""

    @classmethod
    def of(
        cls,
        name: str,
        vocabulary: JointVocabulary,
        config: EncodingConfig,
        default_device: Callable[[], torch.device],
    ) -> Self:
        """With the tokenizer in folder `name`; if there is no such folder, of codes alone that
        something of this name has made.

        Raises:
            UsageError: the tokenizer is not of the vocabulary, or a number is missing or wrong.
        """
        num_codes = config.codes_per_image
        if not Path(name).is_dir():
            if num_codes is None:
                raise UsageError(
                    f"no image tokenizer at {name}; if all pictures are codes that something of "
                    "this name has made, set encoding.codes_per_image"
                )
            return cls(
                tokenizer=None,
                sha256=hashlib.sha256(name.encode()).hexdigest(),
                num_codes=num_codes,
                range=vocabulary.image.size,
                batch_size=config.batch_size,
            )
        tokenizer = load_image_tokenizer(name)
        if tokenizer.num_codes != vocabulary.image.size:
            raise UsageError(
                f"the image tokenizer has {tokenizer.num_codes} codes, the vocabulary "
                f"{vocabulary.image.size}: make the vocabulary with --num_image_codes "
                f"{tokenizer.num_codes}"
            )
        if num_codes not in (None, tokenizer.tokens_per_image):
            raise UsageError(f"{name} makes {tokenizer.tokens_per_image} codes, not {num_codes}")
        return cls(
            tokenizer=tokenizer.to(config.device or default_device()),
            sha256=tokenizer.sha256,
            num_codes=tokenizer.tokens_per_image,
            range=tokenizer.num_codes,
            batch_size=config.batch_size,
        )

    @property
    def image_size(self) -> int | None:
        """Pixels along the side of a picture that is encoded; None if none is."""
        return self.tokenizer.image_size if self.tokenizer else None

    @property
    def device(self) -> torch.device:
        """Where pictures are encoded."""
        return next(self.tokenizer.parameters()).device if self.tokenizer else torch.device("cpu")

    def encode(self, pictures: list[Picture]) -> list[NDArray[np.int64]]:
        """The codes of each picture, int64 [num_codes]."""
        places = [i for i, picture in enumerate(pictures) if picture.ndim == 3]
        codes: list[Any] = list(pictures)
        for begin in range(0, len(places), self.batch_size):
            batch = places[begin : begin + self.batch_size]
            assert self.tokenizer is not None  # else nothing was decoded
            pixels = pixels_from_levels(np.stack([pictures[i] for i in batch]))
            found = self.tokenizer.encode(pixels.to(self.device)).cpu().numpy()
            for place, row in zip(batch, found, strict=True):
                codes[place] = row
        return codes

    def check(self, codes: NDArray[np.int64], where: str) -> None:
        """Raise :class:`BadRecord` unless these can be a picture's codes."""
        if len(codes) != self.num_codes:
            raise BadRecord(where, f"{len(codes)} codes, not {self.num_codes}")
        if codes.min() < 0 or codes.max() >= self.range:
            raise BadRecord(where, f"a code is not in 0..{self.range - 1}")
