"""Train an image tokenizer on the pictures of a WebDataset .tar and show what it keeps of them."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.data.prepare.pictures import picture_of
from megatron_jam.data.prepare.readers import read_records
from megatron_jam.data.prepare.records import fields_of
from megatron_jam.data.prepare.sheet import COLUMNS, contact_sheet
from megatron_jam.parallel.device import select_device
from megatron_jam.tokenizers.image import check_output, pixels_from_levels
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from megatron_jam.training.image_tokenizer import train_image_tokenizer

ROWS = 4  # of reconstructions.png, for each set of pictures
BATCH = 64  # pictures encoded at a time


def main(
    source: str,
    output: str,
    *,
    validation: str | None = None,
    image_size: int = 64,
    patch_size: int = 4,
    channels: tuple[int, ...] = (32, 128),
    num_blocks: int = 1,
    num_codes: int = 512,
    code_dim: int = 16,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> None:
    """Write OUTPUT: the tokenizer, reconstructions.png, history.json and, last, metrics.json.

    Args:
        source: file or folder of pictures, as tools/prepare_images.py reads it; held in memory.
        output: folder to write.
        validation: the same of pictures to reconstruct without training on them.
        image_size: height and width of a picture in pixels; others are resized and cropped.
        patch_size: side of the pixel square folded into channels before the first convolution.
        channels: channels of each level; every level after the first halves height and width.
        num_blocks: residual blocks of each level.
        num_codes: rows of the codebook.
        code_dim: length of a code's vector.
        steps: optimizer steps.
        batch_size: pictures a step.
        learning_rate: peak of AdamW's rate.
        seed: the initial weights, the order of the pictures and the codebook depend on it.
    """
    config = VqConfig(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        num_blocks=num_blocks,
        num_codes=num_codes,
        code_dim=code_dim,
    )
    if seed < 0:
        raise UsageError(f"seed must be at least 0, not {seed}")
    folder = Path(output)
    check_output(folder)
    sets = {"training": read_pictures(source, image_size)}
    if validation is not None:
        sets["validation"] = read_pictures(validation, image_size)
    device = select_device()
    start = time.perf_counter()
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    model, history = train_image_tokenizer(
        sets["training"], config, **settings, seed=seed, device=device
    )
    seconds = round(time.perf_counter() - start, 1)
    model.save(folder)
    records = [dataclasses.asdict(record) for record in history]
    write_text_atomically(folder / "history.json", json.dumps(records, indent=1) + "\n")
    metrics = {"seconds": seconds, **show(model, sets, folder / "reconstructions.png")}
    write_text_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def show(model: VqTokenizer, sets: dict[str, Tensor], path: Path) -> dict[str, dict[str, float]]:
    """Draw pictures of each set beside their reconstructions to `path`; the sets' metrics."""
    originals = torch.cat(list(sets.values()))
    codes = encode(model, originals)
    drawn = torch.cat([model.decode(part).cpu() for part in codes.split(BATCH)])
    sizes = [len(pictures) for pictures in sets.values()]
    shown = [pictures[: ROWS * COLUMNS] for pictures in (*sets.values(), *drawn.split(sizes))]
    firsts = torch.cat(shown[: len(sets)]), torch.cat(shown[len(sets) :])
    contact_sheet(*firsts, path, sizes=[len(pictures) for pictures in shown[: len(sets)]])
    metrics = {}
    for name, own in zip(sets, torch.arange(len(originals)).split(sizes), strict=True):
        metrics[name] = measure(originals, drawn, codes, own)
        logger.info("image tokenizer: %s %s", name, metrics[name])
    return metrics


def read_pictures(path: str, size: int) -> Tensor:
    """Pixels float32 [N, 3, size, size] of the pictures of a .tar."""
    found = (picture_of(record, fields_of(record), size) for record in read_records(path))
    return pixels_from_levels(np.stack(list(found)))


def encode(model: VqTokenizer, pixels: Tensor) -> Tensor:
    """Codes [N, tokens_per_image] on the model's device."""
    device = model.codebook.device
    return torch.cat([model.encode(part.to(device)) for part in pixels.split(BATCH)])


def measure(originals: Tensor, drawn: Tensor, codes: Tensor, own: Tensor) -> dict[str, float]:
    """Of the pictures numbered `own`: mean PSNR in dB, codes used, and the share of reconstructions
    whose nearest neighbour (L2 on pixels) among all originals is their own original."""
    squared = (drawn[own] - originals[own]).square().mean(dim=(1, 2, 3))
    nearest = torch.cdist(drawn[own].flatten(1), originals.flatten(1)).argmin(dim=1)
    return {
        "num_pictures": len(own),
        "psnr": round(float((10 * torch.log10(4 / squared)).mean()), 2),
        "num_codes_used": len(codes[own].unique()),
        "nearest_neighbour_accuracy": round(float((nearest == own).float().mean()), 4),
    }


if __name__ == "__main__":
    run_command(main)
