"""The two ways to the kernel, straight from Python and by torch's dispatcher, draw the same."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_jam.ops import extension
from megatron_jam.ops.guided_sampling import GuidedSample, _by_operator, guided_sample
from megatron_jam.ops.reference import Settings
from tests.ops.sampling import random_logits

ROWS, VOCABULARY = 4, 300
COND, UNCOND = (random_logits(ROWS, VOCABULARY, seed=seed) for seed in (1, 2))
MASK = random_logits(ROWS, VOCABULARY, seed=3) > 0
SEED, OFFSET = torch.tensor([3, -(2**63), 2**63 - 1, 0]), torch.arange(ROWS) * 2**40
PER_ROW = {
    "guidance_scale": torch.tensor([1.0, 3.5, 0.0, -1.0]),
    "temperature": torch.tensor([0.0, 1.0, 5.0, 2.5], dtype=torch.float64),
    "top_p": torch.tensor([0.9, 0.1, 1.0, 0.5], dtype=torch.bfloat16),
    "top_k": torch.tensor([0, 3, 50, 1000]),
    "min_p": torch.tensor([0.0, 0.5, 1e-3, 1.0]),
}
CASES: dict[str, dict[str, Any]] = {
    "numbers": {"guidance_scale": 3.5, "top_p": 0.9, "temperature": 4, "top_k": 40, "min_p": 0.01},
    "no guidance": {"uncond": None, "top_p": 0.8},
    "a row each": PER_ROW,
    "one tensor": {"top_p": torch.tensor(0.7), "guidance_scale": torch.tensor([2.0])},
    "range": {"legal": (30, 90), "temperature": 9.0},
    "ranges": {"legal": torch.tensor([[0, 300], [7, 8], [100, 290], [299, 300]])},
    "mask": {"legal": MASK, "temperature": 9.0},
    "mask of all rows": {"legal": MASK[0], "temperature": 9.0},
    "offset of all rows": {"offset": 7, "temperature": 9.0},
    "half": {"cond": COND.half(), "uncond": UNCOND.half(), "top_p": 0.9},
    "bfloat16": {"cond": COND.bfloat16(), "uncond": UNCOND.bfloat16(), "top_p": 0.9},
    "strides": {"cond": COND.T.contiguous().T, "uncond": UNCOND[:, ::2].repeat(1, 2)},
    "one row": {"cond": COND[:1], "uncond": UNCOND[:1], "seed": 2**63 - 1, "offset": -3},
    "no rows": {"cond": COND[:0], "uncond": UNCOND[:0], "seed": SEED[:0], "offset": 1},
    "truncated": {"truncated": True, "top_p": 0.9, "top_k": 30},
}


def arguments_of(case: dict[str, Any]) -> tuple:
    every = {"cond": COND, "uncond": UNCOND, "legal": None, "seed": SEED, "offset": OFFSET}
    every |= {"truncated": False, **Settings()._asdict(), **case}
    settings = Settings(*(every[name] for name in Settings._fields))
    rest = (every[name] for name in ("legal", "seed", "offset", "truncated"))
    return every["cond"], every["uncond"], settings, *rest


def straight(cond: Tensor, uncond: Tensor | None, settings: Settings, *rest) -> tuple | None:
    return extension.guided_sample(cond, uncond, *settings, *rest)


@pytest.mark.parametrize("case", CASES)
def test_both_ways_draw_the_same(case) -> None:
    arguments = arguments_of(CASES[case])
    drawn, expected = straight(*arguments), _by_operator(*arguments)
    assert drawn is not None
    for one, other in zip(GuidedSample(*drawn), expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


@pytest.mark.parametrize(
    "case",
    {
        "a scalar seed for many rows": {"seed": 3},
        "guidance of nothing": {"uncond": None, "guidance_scale": 2.0},
        "no table": {"cond": COND[0], "uncond": None},
        "numbers of numpy": {"top_p": np.float64(0.9)},
        "a setting of other rows": {"top_p": torch.ones(3)},
        "a list": {"legal": [0, 3]},
        "a seed beyond 64 bits": {"cond": COND[:1], "uncond": UNCOND[:1], "seed": 2**63},
        "another device": {"cond": COND.to("meta"), "uncond": UNCOND.to("meta")},
    }.items(),
    ids=lambda case: case[0],
)
def test_what_is_unusual_goes_to_the_operator(case) -> None:
    assert straight(*arguments_of(case[1])) is None


def test_wrong_rows_are_named_by_the_short_way_too() -> None:
    for wrong, message in (
        ({"uncond": UNCOND[:, 1:]}, "uncond has shape"),
        ({"legal": torch.zeros(ROWS, VOCABULARY)}, "legal is Float"),
        ({"temperature": -1.0}, "row 0: temperature must be"),
        ({"top_k": 2.5}, "row 0: .* top_k a whole number"),
        ({"legal": (299, 301)}, "row 0: the range of legal ids"),
    ):
        with pytest.raises(ValueError, match=message):
            straight(*arguments_of(wrong))


class Recorded(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_who_watches_sees_the_operator() -> None:
    expected = guided_sample(COND, UNCOND, seed=SEED, offset=OFFSET)
    with Recorded() as recorded:
        watched = guided_sample(COND, UNCOND, seed=SEED, offset=OFFSET)
    assert recorded.names[-1] == "megatron_jam.guided_sample.default"
    assert torch.equal(watched.tokens, expected.tokens)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) for each in (COND, UNCOND, SEED, OFFSET)]
        fake = guided_sample(*fakes[:2], seed=fakes[2], offset=fakes[3])
    assert fake.tokens.shape == (ROWS,)
    assert type(fake.tokens) is type(fakes[0])
    with torch.profiler.profile() as profile:
        guided_sample(COND, UNCOND, seed=SEED, offset=OFFSET)
    assert "megatron_jam::guided_sample" in {event.key for event in profile.key_averages()}
