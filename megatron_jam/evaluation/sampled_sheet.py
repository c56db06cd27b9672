"""A sheet of pictures that the live model draws at each validation: OUTPUT/sheets/step-N.png."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from megatron_jam.config.files import publish, temporary_name
from megatron_jam.config.log import logger
from megatron_jam.config.run import RunConfig
from megatron_jam.data.loader import image_tokenizer_of
from megatron_jam.generation.decoder import Decoder
from megatron_jam.generation.documents import check_image_tokenizer
from megatron_jam.generation.stages import Stages
from megatron_jam.tokenizers.document import image_prompt, split_document
from megatron_jam.tokenizers.image import image_from_pixels
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.loop import Training
from megatron_jam.training.losses import Losses

COLUMNS, SPACE = 4, 16
"""Pictures in a row; pixels above each for its caption."""


class SampledSheet(Callback):
    """Draws a picture for each of `sheet.captions`, always with the same random numbers."""

    def __init__(self, config: RunConfig, *, writes: bool) -> None:
        """Draw for a run of `config`; one rank writes."""
        self._config, self._writes = config, writes
        self._training: Training | None = None

    def begins(self, training: Training, first: int) -> None:
        """Load the tokenizers.

        Raises:
            UsageError: the image tokenizer, the captions and the model do not go together.
        """
        sheet = self._config.sheet
        if not sheet.captions:
            return
        self._training, folder = training, training.folder
        images = load_image_tokenizer(sheet.image_tokenizer)
        of_data = image_tokenizer_of(self._config.data)
        check_image_tokenizer(
            images,
            folder,
            trained=of_data or folder.image_tokenizer_sha256,
            pictures="data.sets" if of_data else f"the pictures that {folder.path} was trained on",
            name="sheet.image_tokenizer",
        )
        self._images = images.to(training.world.device) if self._writes else images
        text = TextTokenizer.load(folder.tokenizer_path)
        self._prompts = [
            image_prompt(folder.vocabulary, text.encode(each.rstrip())) for each in sheet.captions
        ]
        chunks, calls, world = training.engine.for_decoding()
        self._decoder = Decoder(
            Stages(chunks, world, calls),
            world,
            folder.vocabulary,
            tokens_per_image=images.tokens_per_image,
        )

    def validated(self, step: int, measured: Mapping[str, Losses]) -> None:
        """Draw the sheet; all ranks take part."""
        if self._training is None:
            return
        # A caption's picture alone: one that has begun is always finished.
        settings = dataclasses.replace(self._config.sheet.sampling, max_new_tokens=1)
        poll = partial(self._training.poll, "drawing")
        written = self._decoder.generate(self._prompts, settings, poll=poll)
        if not self._writes:
            return
        vocabulary, device = self._training.folder.vocabulary, self._training.world.device
        codes = [
            next(content for kind, content in split_document(vocabulary, each) if kind == "image")
            for each in written
        ]
        pixels = self._images.decode(torch.from_numpy(np.stack(codes)).to(device))
        path = self._config.output / "sheets" / f"step-{step:08d}.png"
        save_sheet([image_from_pixels(each) for each in pixels], self._config.sheet.captions, path)
        logger.info("step %d | drew %d pictures: %s", step, len(codes), path)


def save_sheet(pictures: list[Image.Image], captions: list[str], path: Path) -> None:
    """Write pictures in rows, each under its caption, as PNG; whole or not at all."""
    size = max(pictures[0].width, 64)
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * size, rows * (size + SPACE)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        y, x = divmod(number, COLUMNS)
        place = (x * size, y * (size + SPACE))
        pen.text((place[0] + 2, place[1] + 2), caption[: size // 6], fill="black")
        enlarged = picture.resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (place[0], place[1] + SPACE))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    sheet.save(temporary, format="PNG")
    publish(temporary, path)
