"""Draws have the exact probabilities, of their definition and of Hugging Face's processors."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from megatron_jam.ops.guided_sampling import guided_sample, truncated_probabilities
from tests.helpers.kernels import ROOT
from tests.ops.sampling import assert_chi_squared, counts_of, kept_by_definition, random_logits

TOP_PS = [0.1, 0.5, 0.8, 0.9, 0.95, 1.0]
SCALES = [0.0, 1.0, 3.5, 4.0]
TEXT = ROOT / "examples" / "quickstart" / "data"


def bigram_logits(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Real logits: a bigram model of the quickstart's text, an id for each pair of bytes.

    The pairs are hashed where there are more of them than ids. `cond` knows that the last pair was
    "e ", `uncond` knows nothing; both are smoothed logarithms of counts.
    """
    text = b"".join(path.read_bytes() for path in sorted(Path(TEXT).rglob("*.jsonl*")))
    ids = [
        int.from_bytes(text[i : i + 2], "big") * 40_503 % vocabulary for i in range(len(text) - 1)
    ]
    context = int.from_bytes(b"e ", "big") * 40_503 % vocabulary
    after = Counter(b for a, b in zip(ids, ids[2:], strict=False) if a == context)
    streams = []
    for counts in (after, Counter(ids)):
        logits = torch.full((vocabulary,), math.log(1e-3))
        for identity, count in counts.items():
            logits[identity] = math.log(count + 1e-3)
        streams.append(logits)
    return streams[0], streams[1]


def logits_of(shape: str, vocabulary: int) -> tuple[Tensor, Tensor]:
    if shape == "real":
        return bigram_logits(vocabulary)
    noise = random_logits(2, vocabulary, seed=6, spread=1.0)
    cond, uncond = {
        "peaked": noise * 4,
        "flat": noise * 0.1,
        "bimodal": noise * 0.3 + 3 * (torch.arange(vocabulary) % 2),
    }[shape]
    return cond, uncond


def exact(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """An independent float64 softmax [V]."""
    return (uncond.double() + scale * (cond.double() - uncond.double())).softmax(0)


def check_cells(shape: str, vocabulary: int, *, scales, top_ps, num: int) -> None:
    cond, uncond = logits_of(shape, vocabulary)
    for scale in scales:
        probabilities = exact(cond, uncond, scale)
        for top_p in top_ps:
            counts = counts_of(cond, uncond, num=num, guidance_scale=scale, top_p=top_p)
            kept = kept_by_definition(probabilities, top_p=top_p)
            assert counts[~kept].sum() == 0
            expected = probabilities[kept] / probabilities[kept].sum() * num
            assert_chi_squared(counts[kept], expected)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("shape", ["peaked", "flat", "bimodal"])
def test_draws_follow_the_exact_probabilities(backend, shape, scale, top_p) -> None:
    num = 400 if backend == "emulated" else 10_000
    check_cells(shape, 60, scales=[scale], top_ps=[top_p], num=num)


@pytest.mark.parametrize("shape", ["peaked", "flat", "bimodal", "real"])
def test_draws_follow_the_exact_probabilities_of_image_codes(shape) -> None:
    check_cells(shape, 8192, scales=[3.5], top_ps=[0.5, 0.9, 1.0], num=20_000)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Rows over all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [8192, 65536])
@pytest.mark.parametrize("shape", ["peaked", "flat", "bimodal", "real"])
def test_draws_follow_the_exact_probabilities_in_full(all_cores, shape, vocabulary) -> None:
    num = 200_000 if vocabulary == 8192 else 50_000
    check_cells(shape, vocabulary, scales=SCALES, top_ps=TOP_PS, num=num)


def outside_of(vocabulary: int, num: int) -> None:
    cond, uncond = logits_of("peaked", vocabulary)
    settings = {"guidance_scale": 3.5, "temperature": 3.0, "top_p": 0.8}
    probabilities = (exact(cond, uncond, 3.5).log() / 3.0).softmax(0)
    kept = kept_by_definition(probabilities, top_p=0.8)
    counts = counts_of(cond, uncond, num=num, **settings)
    assert counts.sum() == num
    assert counts[~kept].sum() == 0
    assert_chi_squared(counts[kept], probabilities[kept] / probabilities[kept].sum() * num)


def test_a_million_draws_stay_in_the_nucleus() -> None:
    outside_of(256, 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [256, 8192])
def test_ten_million_draws_stay_in_the_nucleus(all_cores, vocabulary) -> None:
    outside_of(vocabulary, 10_000_000)


def hugging_face(cond: Tensor, uncond: Tensor, scale: float, **settings) -> Tensor:
    """Probabilities [V] behind its chain of processors."""

    class Model:  # whose only use is to give the unconditional logits
        def __call__(self, *_, **__):
            return type("Output", (dict,), {"logits": uncond[None, None]})(past_key_values=None)

    scores = cond[None]
    ids = torch.zeros(1, 1, dtype=torch.int64)
    if scale != 1:
        guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            scale, Model(), unconditional_ids=ids, use_cache=False
        )
        scores = guide(ids, scores)
    for warper, name, off in (
        (TemperatureLogitsWarper, "temperature", 1.0),
        (TopKLogitsWarper, "top_k", 0),
        (TopPLogitsWarper, "top_p", 1.0),
        (MinPLogitsWarper, "min_p", 0.0),
    ):
        if settings.get(name, off) != off:
            scores = warper(settings[name])(ids, scores)
    return scores.softmax(1)[0]


HF_SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_k": 10},
    {"top_k": 40, "top_p": 0.5, "temperature": 3.0},
    {"min_p": 0.05, "temperature": 1.5},
    {"top_k": 100, "top_p": 0.95, "min_p": 0.02, "temperature": 2.5},
]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("settings", HF_SETTINGS, ids=str)
def test_probabilities_are_those_of_hugging_face(settings, scale) -> None:
    for seed in range(3):
        cond, uncond = random_logits(2, 1000, seed=seed, spread=2.0)
        theirs = hugging_face(cond, uncond, scale, **settings)
        ours = truncated_probabilities(cond[None], uncond[None], guidance_scale=scale, **settings)[
            0
        ]
        assert (ours[theirs == 0] == 0).all()
        assert (ours[theirs > 2.0**-35 * theirs.max()] > 0).all()  # less may round to nothing
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-10)
        counts = counts_of(cond, uncond, num=5_000, guidance_scale=scale, **settings)
        assert counts[theirs == 0].sum() == 0
        assert_chi_squared(counts, theirs.double() * 5_000)


def test_greedy_tokens_are_those_of_hugging_face() -> None:
    cond, uncond = random_logits(50, 1000, seed=1), random_logits(50, 1000, seed=2)
    tokens = guided_sample(
        cond, uncond, guidance_scale=3.5, temperature=0.0, seed=torch.arange(50), offset=0
    ).tokens
    theirs = [int(hugging_face(*pair, 3.5).argmax()) for pair in zip(cond, uncond, strict=True)]
    assert tokens.tolist() == theirs
