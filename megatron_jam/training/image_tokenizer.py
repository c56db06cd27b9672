"""Train an :class:`ImageTokenizer` on pictures held in memory.

The recipe, each part well known: a plain autoencoder first, without quantisation; then the codebook
starts from k-means of its features; from there on the decoder reads codes, the gradient passes
straight through to the encoder (VQ-VAE, arXiv 1711.00937, section 3.2), a commitment loss holds the
encoder to its codes, the codebook follows by moving averages (appendix A.1 there), and codes that
fell out of use start again at badly coded features. AdamW with warm-up and a cosine decay.
"""

import dataclasses
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer

ABSOLUTE_WEIGHT = 0.1  # of the mean absolute error beside the mean squared one
COMMITMENT_WEIGHT = 0.125
CONTINUOUS_SHARE = 0.1  # of the steps, before quantisation starts
REVIVAL_SHARE = 0.7  # of the steps, after which no code moves by a jump
REVIVAL_INTERVAL = 20  # steps
DEAD_SHARE = 0.1  # of the mean count, under which a code counts as out of use
CODEBOOK_DECAY = 0.99
WARMUP_STEPS = 50
MAX_GRADIENT_NORM = 1.0
KMEANS_VECTORS = 32768  # at most
KMEANS_ROUNDS = 10
NUM_RECORDS = 100  # at most, in a history
LOG_SECONDS = 5.0

# What a random draw is for: generators are seeded from (seed, purpose, index).
_ORDER, _REVIVAL, _KMEANS = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTrainingRecord:
    """How far the training was after a step, measured on that step's batch."""

    step: int
    """Steps done."""

    loss: float
    """Mean squared + weighted absolute error of pixels in [-1, 1], + weighted commitment."""

    psnr: float
    """Peak signal to noise ratio, in dB, of the batch as a whole."""

    num_codes_used: int
    """Codes in use lately; 0 while there is no quantisation yet."""


def train_image_tokenizer(
    images: Tensor,
    config: VqConfig,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device | str,
) -> tuple[VqTokenizer, list[ImageTrainingRecord]]:
    """Train on `images`: uint8 [N, 3, H, W], or float of [-1, 1].

    On a CPU the result is a pure function of the arguments; a GPU's sums vary in their last bits.

    Returns:
        The tokenizer, on `device` in evaluation mode, and at most about NUM_RECORDS records.

    Raises:
        UsageError: no images; `steps`, `batch_size` or `learning_rate` is not positive.
    """
    _check(len(images), steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    pixels = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    pixels = pixels.to(device)
    tokenizer = VqTokenizer(config, seed=seed).to(device).train()
    optimizer = torch.optim.AdamW(
        tokenizer.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=True
    )
    batch_size = min(batch_size, len(pixels))
    num_continuous = round(steps * CONTINUOUS_SHARE)
    codebook: _MovingCodebook | None = None
    history: list[ImageTrainingRecord] = []
    start = logged = time.perf_counter()
    for step in range(steps):
        if step == num_continuous:
            codebook = _MovingCodebook(tokenizer, pixels, batch_size=batch_size, seed=seed)
        batch = pixels[_batch_indices(step, len(pixels), batch_size, seed).to(device)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _learning_rate_share(step, steps)
        loss, squared = _train_step(tokenizer, optimizer, codebook, batch)
        if codebook and step % REVIVAL_INTERVAL == 0 and step < steps * REVIVAL_SHARE:
            codebook.revive(batch, seed=seed, step=step)
        done, now = step + 1, time.perf_counter()
        is_logged = now - logged > LOG_SECONDS or done == steps
        is_recorded = done % math.ceil(steps / NUM_RECORDS) == 0 or done == steps
        if not (is_recorded or is_logged):
            continue  # reading the loss would make a GPU wait
        record = ImageTrainingRecord(
            step=done,
            loss=float(loss),
            psnr=10 * math.log10(4 / max(float(squared), 1e-10)),
            num_codes_used=codebook.num_used() if codebook else 0,
        )
        if is_recorded:
            history.append(record)
        if is_logged:
            logged = now
            _log(record, steps, seconds_left=(now - start) / done * (steps - done))
    return tokenizer.eval(), history


def _check(num_images: int, *, steps: int, batch_size: int, learning_rate: float) -> None:
    for name, value in (("steps", steps), ("batch_size", batch_size), ("images", num_images)):
        if value < 1:
            raise UsageError(f"{name}: at least 1 is needed, not {value}")
    if not 0 < learning_rate < math.inf:
        raise UsageError(f"learning_rate must be positive, not {learning_rate}")


def _train_step(
    tokenizer: VqTokenizer,
    optimizer: torch.optim.Optimizer,
    codebook: "_MovingCodebook | None",
    batch: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step; the loss and the mean squared error before it."""
    features = vectors = tokenizer.features(batch)
    commitment = features.new_zeros(())
    if codebook is not None:
        codes = tokenizer.nearest_codes(features.detach())
        codebook.update(features.detach(), codes)
        vectors = tokenizer.quantize(features, codes)
        # Squared distance of unit vectors.
        commitment = 2 - 2 * (features * tokenizer.codebook[codes]).sum(dim=-1).mean()
    error = tokenizer.pixels(vectors) - batch
    squared = error.square().mean()
    loss = squared + ABSOLUTE_WEIGHT * error.abs().mean() + COMMITMENT_WEIGHT * commitment
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach(), squared.detach()


class _MovingCodebook:
    """A tokenizer's codebook in motion: a code points where the moving sum of its features does."""

    @torch.no_grad()
    def __init__(
        self, tokenizer: VqTokenizer, pixels: Tensor, *, batch_size: int, seed: int
    ) -> None:
        """Start the codebook from k-means of the features of a choice of `pixels`."""
        self.tokenizer = tokenizer
        random = np.random.default_rng([seed, _KMEANS, 0])
        num_pictures = max(1, KMEANS_VECTORS // tokenizer.tokens_per_image)
        choice = torch.from_numpy(random.permutation(len(pixels))[:num_pictures]).to(pixels.device)
        parts = [tokenizer.features(pixels[part]) for part in choice.split(batch_size)]
        features = torch.cat(parts).flatten(0, 1)
        tokenizer.codebook.copy_(_spherical_kmeans(features, tokenizer.num_codes, random))
        counts = _count(tokenizer.nearest_codes(features), tokenizer.num_codes)
        self.counts = counts * (batch_size * tokenizer.tokens_per_image / len(features))
        self.sums = tokenizer.codebook * self.counts[:, None]

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor) -> None:
        """Follow a batch: `features` [B, T, code_dim] and their nearest `codes` [B, T]."""
        features, codes = features.flatten(0, 1), codes.flatten()
        self.counts.lerp_(_count(codes, len(self.counts)), 1 - CODEBOOK_DECAY)
        self.sums.lerp_(_sum_by_code(features, codes, len(self.counts)), 1 - CODEBOOK_DECAY)
        self.tokenizer.codebook.copy_(F.normalize(self.sums, dim=-1))

    @torch.no_grad()
    def revive(self, batch: Tensor, *, seed: int, step: int) -> None:
        """Restart the codes out of use at features of `batch`, rather badly coded ones."""
        dead = (self.counts < DEAD_SHARE * self.counts.mean()).nonzero().flatten()
        features = self.tokenizer.features(batch).flatten(0, 1)
        dead = dead[: len(features)]
        distance = 1 - (features @ self.tokenizer.codebook.T).amax(dim=-1)
        random = np.random.default_rng([seed, _REVIVAL, step])
        chosen = random.choice(len(features), len(dead), replace=False, p=_chances(distance))
        self.counts[dead] = self.counts.mean()
        self.sums[dead] = features[torch.from_numpy(chosen).to(dead.device)] * self.counts.mean()

    def num_used(self) -> int:
        """Codes in use lately."""
        return int((self.counts >= DEAD_SHARE * self.counts.mean()).sum())


def _spherical_kmeans(features: Tensor, num_codes: int, random: np.random.Generator) -> Tensor:
    """Unit centres [num_codes, code_dim] of unit `features` [n, code_dim], from k-means++."""
    centres = features[random.integers(len(features))][None]
    distance = 1 - features @ centres[0]
    while len(centres) < num_codes:
        centre = features[random.choice(len(features), p=_chances(distance))]
        centres = torch.cat([centres, centre[None]])
        distance = torch.minimum(distance, 1 - features @ centre)
    for _ in range(KMEANS_ROUNDS):
        codes = (features @ centres.T).argmax(dim=-1)
        is_used = _count(codes, num_codes)[:, None] > 0
        means = F.normalize(_sum_by_code(features, codes, num_codes), dim=-1)
        centres = torch.where(is_used, means, centres)
    return centres


def _chances(distance: Tensor) -> np.ndarray:
    weights = distance.double().clamp_min(1e-9).cpu().numpy()
    return weights / weights.sum()


def _count(codes: Tensor, num_codes: int) -> Tensor:
    return torch.bincount(codes.flatten(), minlength=num_codes).float()


def _sum_by_code(features: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    sums = features.new_zeros(num_codes, features.shape[-1])
    return sums.index_add_(0, codes, features)


def _batch_indices(step: int, num_images: int, batch_size: int, seed: int) -> Tensor:
    epoch, place = divmod(step, num_images // batch_size)
    order = np.random.default_rng([seed, _ORDER, epoch]).permutation(num_images)
    return torch.from_numpy(order[place * batch_size : (place + 1) * batch_size])


def _learning_rate_share(step: int, steps: int) -> float:
    warm = min(WARMUP_STEPS, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _log(record: ImageTrainingRecord, steps: int, *, seconds_left: float) -> None:
    logger.info(
        "image tokenizer: step %d of %d, loss %.4f, PSNR %.1f dB, %d codes in use, %.0f s left",
        *(record.step, steps, record.loss, record.psnr, record.num_codes_used, seconds_left),
    )
