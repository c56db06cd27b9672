"""Sharded sampling draws the very tokens of whole rows, on gloo ranks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.ops.guided_sampling import guided_sample
from megatron_jam.ops.sharded_sampling import guided_sample_sharded
from megatron_jam.parallel.world import World
from tests.ops.sampling import random_logits

ROWS, VOCABULARY = 6, 4096
CASES = {
    "plain": {},
    "nucleus": {"guidance_scale": 3.5, "top_p": 0.9, "temperature": 2.0},
    "flat": {"guidance_scale": 3.5, "top_p": 0.3, "temperature": 60.0},
    "top-k": {"guidance_scale": 3.5, "top_k": 7, "top_p": 0.8, "temperature": 5.0},
    "min-p": {"guidance_scale": 0.5, "min_p": 0.03, "top_p": 0.99},
    "greedy": {"temperature": 0.0, "guidance_scale": 2.0},
    "rows": {
        "guidance_scale": torch.tensor([1.0, 3.5, 4.0, 0.0, -1.0, 2.0]),
        "temperature": torch.tensor([1.0, 9.0, 0.0, 1.0, 4.0, 2.0]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.2, 1e-6, 1.0]),
        "top_k": torch.tensor([0, 3, 0, 50, 0, 1]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 1.0]),
    },
}
SPANS = [(1020, 1030), (0, 900), (500, 4096), (4095, 4096)]
RANGES = torch.tensor([[0, 4096], [1000, 1100], [1023, 1026], [4095, 4096], [0, 1], [2048, 3072]])


def whole_rows() -> tuple[Tensor, Tensor, Tensor]:
    cond, uncond = (random_logits(ROWS, VOCABULARY, seed=seed) for seed in (1, 2))
    cond[0, [5, 2000, 4000]] = 30.0  # equals on several ranks
    uncond[0, [5, 2000, 4000]] = 30.0
    return cond, uncond, random_logits(ROWS, VOCABULARY, seed=3) > 0


def draws() -> dict[str, Tensor]:
    return {"seed": torch.arange(ROWS) - 3, "offset": torch.arange(ROWS) * 2**33}


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """What this rank gives to collectives."""
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, place in (("all_gather", 1), ("all_reduce", 0)):

            def counting(*arguments, own=getattr(dist, name), place=place, **named):
                sent.append(arguments[place].nbytes)
                return own(*arguments, **named)

            patch.setattr(dist, name, counting)
        yield sent


def sharded(world: World) -> dict[Any, Any]:
    group = world.groups.tp
    share = VOCABULARY // group.size()
    own = slice(group.rank() * share, (group.rank() + 1) * share)
    cond, uncond, mask = (each[:, own] for each in whole_rows())
    found = {}
    for name, settings in CASES.items():
        pair = (cond, uncond) if "guidance_scale" in settings else (cond, None)
        for legal_name, legal in (("all", None), ("mask", mask), ("ranges", RANGES)):
            found[f"{name}, {legal_name}"] = guided_sample_sharded(
                *pair,
                group=group,
                legal=legal,
                **draws(),
                **settings,
                truncated_log_probability=True,
            )
    pair = (cond, uncond)
    with counted_bytes() as sent:
        guided_sample_sharded(*pair, group=group, guidance_scale=3.5, top_p=1.0, **draws())
    found["bytes"] = sum(sent)
    for legal in SPANS:  # on one rank, on two, on all; a single id
        found[legal] = guided_sample_sharded(
            *pair, group=group, legal=legal, temperature=9.0, top_p=0.7, top_k=5, **draws()
        )
    for name, bad, legal in (
        ("nan", torch.where(torch.arange(ROWS)[:, None] == 2, torch.nan, cond), None),
        ("none", torch.where(torch.arange(ROWS)[:, None] == 4, -torch.inf, cond), None),
        ("range", cond, (4000, 4097)),
    ):
        try:
            guided_sample_sharded(bad, group=group, legal=legal, **draws())
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_draw_the_tokens_of_whole_rows(pool, ranks) -> None:
    cond, uncond, mask = whole_rows()
    answers = pool.run(sharded, ParallelConfig(tensor=ranks))
    for name, settings in CASES.items():
        pair = (cond, uncond) if "guidance_scale" in settings else (cond, None)
        for legal_name, legal in (("all", None), ("mask", mask), ("ranges", RANGES)):
            expected = guided_sample(
                *pair, legal=legal, **draws(), **settings, truncated_log_probability=True
            )
            for answer in answers:
                drawn = answer[f"{name}, {legal_name}"]
                assert torch.equal(drawn.tokens, expected.tokens), (name, legal_name)
                torch.testing.assert_close(drawn[1:], expected[1:], rtol=3e-7, atol=1e-12)
    for legal in SPANS:
        settings = {"temperature": 9.0, "top_p": 0.7, "top_k": 5}
        expected = guided_sample(cond, uncond, legal=legal, **settings, **draws())
        assert all(torch.equal(answer[legal].tokens, expected.tokens) for answer in answers)
    for answer in answers:
        assert 0 < answer["bytes"] <= 50 * ROWS  # a share of logits has 4 V / ranks bytes a row
        assert answer["nan"] == "row 2: a logit of a legal id is NaN or +inf"
        assert answer["none"] == "row 4: no legal id has a logit above -inf"
        assert answer["range"] == "row 0: the range of legal ids must be within the vocabulary"
