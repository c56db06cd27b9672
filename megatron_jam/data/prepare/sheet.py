"""Contact sheets: pictures, and what their codes keep of them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_jam.config.files import publish, temporary_name
from megatron_jam.data.prepare.pairs import PairJob
from megatron_jam.data.prepare.running import Run
from megatron_jam.tokenizers.image import image_from_pixels, pixels_from_levels

COLUMNS = 12


def contact_sheet(originals: Tensor, drawn: Tensor, path: Path, *, sizes: Sequence[int]) -> None:
    """Write a PNG: rows of originals, each above the row of its reconstructions.

    Args:
        originals: pixels [N, 3, size, size] in [-1, 1].
        drawn: the same of the reconstructions.
        path: file to write.
        sizes: pictures of each set, N in all; a set begins a row of its own.
    """
    rows = []
    for pair in zip(originals.split(list(sizes)), drawn.split(list(sizes)), strict=True):
        for begin in range(0, len(pair[0]), COLUMNS):
            rows += [pictures[begin : begin + COLUMNS] for pictures in pair]
    size = originals.shape[-1]
    sheet = Image.new("RGB", (COLUMNS * size, len(rows) * size), "white")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            sheet.paste(image_from_pixels(pixels), (x * size, y * size))
    temporary = temporary_name(path)
    sheet.save(temporary, format="PNG")
    publish(temporary, path)


@torch.no_grad()
def write_sheet(run: Run, job: PairJob, count: int) -> None:
    """Write PREFIX.png of the first `count` pictures that a run has read."""
    tokenizer = job.images.tokenizer
    assert tokenizer is not None
    levels = list(islice(_levels(run, job), count))
    if not levels:
        return
    originals = pixels_from_levels(np.stack(levels))
    codes = torch.from_numpy(np.stack(job.images.encode(levels)))
    drawn = torch.cat(
        [
            tokenizer.decode(part.to(job.images.device)).cpu()
            for part in codes.split(job.images.batch_size)
        ]
    )
    contact_sheet(originals, drawn, Path(f"{run.prefix_of()}.png"), sizes=[len(levels)])


def _levels(run: Run, job: PairJob) -> Iterator[np.ndarray]:
    for chunk in run.chunks(job):
        yield from (each.pair.picture for each in job.read(chunk)[0] if each.pair.picture.ndim == 3)
