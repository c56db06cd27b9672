"""Guided sampling over Hugging Face's chain of processors, over a copy of the logits in memory, and
64 rows on two threads over one.

The chain is what transformers' generate does with two streams: log-softmax of both, guidance,
temperature, top-p by a sort, softmax and multinomial. Ours is the public call, Python included.
"""

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from benchmarks.timing import Run, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.ops.guided_sampling import guided_sample, truncated_probabilities
from megatron_jam.parallel.device import select_device, synchronize

SCALE, TOP_P, TEMPERATURE = 3.5, 0.9, 1.0
REPEATS = 20
"""Rows that are timed together, at least: one takes microseconds."""


def main(
    *, pairs: int = 15, device: Literal["cpu", "cuda"] = "cpu", tokens: int = 0, json: bool = False
) -> None:
    """Print ratios, peer's time over ours: above 1 ours is faster.

    Args:
        pairs: how often each is run.
        device: where; a GPU is waited for after each run.
        tokens: size of the vocabulary; 0: 65,536 and 8,192.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    if pairs < 1:
        raise UsageError(f"pairs is {pairs}; it must be at least 1")
    if device == "cuda" and select_device().type != "cuda":
        raise UsageError("device is cuda, but torch finds no GPU")
    torch.set_num_threads(1)
    for vocabulary, rows, spread in itertools.product(
        [tokens] if tokens else [65_536, 8_192], (1, 64), (1.0, 3.0)
    ):
        cond, uncond = logits(rows, vocabulary, spread, device)
        calls = max(REPEATS // rows, 1)
        check(cond, uncond)
        ours = timed(lambda c=cond, u=uncond, s=seeds(cond): draw(c, u, s), device, calls=calls)
        name = f"{rows} x {vocabulary} ids, N(0, {spread:.0f}):"
        chain = timed(lambda c=cond, u=uncond: hugging_face(c, u), device, calls=calls)
        speed_over(f"{name} speed over transformers", ours, chain, pairs=pairs).print(as_json=json)
        both = torch.cat([cond, uncond])
        copy = timed(lambda to=torch.empty_like(both), b=both: to.copy_(b), device, calls=calls)
        speed_over(f"{name} speed over a copy of both rows", ours, copy, pairs=pairs).print(
            as_json=json
        )
    if device == "cpu":
        threads(pairs, json)


def threads(pairs: int, json: bool) -> None:
    """64 rows on two threads over one, and what mere reading of them gains."""
    cond, uncond = logits(64, 65_536, 1.0, "cpu")
    seed = seeds(cond)

    def on(num: int, call: Run) -> Run:
        def run() -> None:
            torch.set_num_threads(num)
            call()

        return run

    for name, call in {
        "speed": lambda: draw(cond, uncond, seed),
        "speed of reading (largest of each row)": lambda: (cond.amax(1), uncond.amax(1)),
    }.items():
        name = f"64 rows of 65536 ids: {name} on two threads over one"
        speed_over(name, on(2, call), on(1, call), pairs=pairs).print(as_json=json)


def logits(rows: int, vocabulary: int, spread: float, device: str) -> list[Tensor]:
    """Conditional and unconditional ones, float32 [rows, vocabulary]."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, rows, vocabulary, generator=generator) * spread
    return [each.clone().to(device) for each in pair]


def seeds(cond: Tensor) -> int | Tensor:
    """One for each row, as a decoder holds them."""
    rows = len(cond)
    return 3 if rows == 1 else torch.arange(rows, device=cond.device)


def draw(cond: Tensor, uncond: Tensor, seed: int | Tensor) -> Tensor:
    """Our call."""
    return guided_sample(
        cond,
        uncond,
        guidance_scale=SCALE,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=seed,
        offset=4,
    ).tokens


_WARPERS = (TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P))


def hugging_face_probabilities(cond: Tensor, uncond: Tensor) -> Tensor:
    """Its chain: UnbatchedClassifierFreeGuidanceLogitsProcessor's formula, then its warpers."""
    c, u = cond.log_softmax(-1), uncond.log_softmax(-1)
    scores = SCALE * (c - u) + u
    for warper in _WARPERS:
        scores = warper(None, scores)
    return scores.softmax(-1)


def hugging_face(cond: Tensor, uncond: Tensor) -> Tensor:
    """A token of it."""
    return torch.multinomial(hugging_face_probabilities(cond, uncond), 1)


def check(cond: Tensor, uncond: Tensor) -> None:
    """Both have the same probabilities."""
    ours = truncated_probabilities(
        cond, uncond, guidance_scale=SCALE, temperature=TEMPERATURE, top_p=TOP_P
    )
    torch.testing.assert_close(ours, hugging_face_probabilities(cond, uncond), rtol=1e-4, atol=1e-9)


def timed(call: Callable[[], object], device: str, *, calls: int) -> Run:
    """Several calls, up to the end of what they started."""

    def run() -> None:
        for _ in range(calls):
            call()
        synchronize(torch.device(device))

    return run


if __name__ == "__main__":
    run_command(main)
