"""Any shapes, strides, types and values: all backends give what the specification gives."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_jam.ops.guided_sampling import guided_sample, truncated_probabilities
from megatron_jam.ops.reference import guided_sample_row, truncated_probabilities_row
from tests.helpers.kernels import BACKENDS, has_backend, using

SPECIAL = [0.0, -0.0, -math.inf, math.inf, math.nan, 1e-38, 3e38, -3e38, 65504.0, 1.0, 1.0 + 2**-23]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Two rows of logits with settings of each, and what is legal."""
    vocabulary = draw(st.sampled_from([1, 2, 7, 31, 32, 33, 127, 128, 129, 300, 1025]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    stride, dtype = vocabulary + draw(st.integers(0, 5)), draw(st.sampled_from(DTYPES))

    def rows() -> Tensor:
        scale = draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 8.0, 1e4]))
        values = torch.randn(2, stride, generator=generator) * scale
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
            values[:, int(torch.randint(vocabulary, (), generator=generator))] = value
        if draw(st.booleans()):
            values = values.round()  # ties
        return values.to(dtype)[:, :vocabulary]

    begin = draw(st.integers(0, vocabulary))
    legal = draw(st.sampled_from(["all", "mask", "range"]))
    of_row = {
        "guidance_scale": st.sampled_from([0.0, 1.0, 3.5, -2.0, 0.3]),
        "temperature": st.sampled_from([0.0, 1e-6, 0.7, 1.0, 30.0, 1e30]),
        "top_p": st.sampled_from([1e-12, 0.1, 0.5, 0.9, 1.0]),
        "top_k": st.sampled_from([0, 1, 2, 50, 5000]),
        "min_p": st.sampled_from([0.0, 1e-12, 0.05, 0.5, 1.0]),
    }
    return {
        "pair": (rows(), rows() if draw(st.booleans()) else None),
        "legal": {
            "all": None,
            "mask": torch.rand(2, vocabulary, generator=generator) > 0.4,
            "range": torch.tensor([[begin, vocabulary], [0, begin]]),
        }[legal],
        "settings": {name: [draw(values), draw(values)] for name, values in of_row.items()},
        "seed": [draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(2)],
    }


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(call: dict[str, Any], row: int) -> tuple[Any, Tensor] | str:
    """What the specification says of a row: its draw and its probabilities, or an error."""
    cond, uncond = (each if each is None else each[row] for each in call["pair"])
    legal = call["legal"]
    if legal is not None:
        ids = torch.arange(len(cond))
        ranged = legal.dtype == torch.int64
        legal = (ids >= legal[row, 0]) & (ids < legal[row, 1]) if ranged else legal[row]
    given_row = {name: values[row] for name, values in call["settings"].items()}
    try:
        return (
            guided_sample_row(
                cond, uncond, legal=legal, seed=call["seed"][row], offset=row, **given_row
            ),
            truncated_probabilities_row(cond, uncond, legal=legal, **given_row),
        )
    except ValueError as error:
        return str(error)


def check(call: dict[str, Any]) -> None:
    if call["pair"][1] is None:
        call["settings"]["guidance_scale"] = [1.0, 1.0]
    wanted = [expected(call, row) for row in range(2)]
    tables = {
        name: torch.tensor(values, dtype=torch.float64) for name, values in call["settings"].items()
    }
    if call["pair"][1] is None:
        tables["guidance_scale"] = 1.0
    for backend in BACKENDS:
        if not has_backend(backend):
            continue
        with using(backend, threads=96, seed=call["seed"][0] % 2**32):
            for row, want in enumerate(wanted):
                pair = [each if each is None else each[[row]] for each in call["pair"]]
                legal = call["legal"] if call["legal"] is None else call["legal"][[row]]
                own = {
                    name: each if isinstance(each, float) else each[[row]]
                    for name, each in tables.items()
                }
                draws = {"seed": torch.tensor(call["seed"][row : row + 1]), "offset": row}
                if isinstance(want, str):
                    with pytest.raises(ValueError, match="row 0: ") as raised:
                        guided_sample(*pair, legal=legal, **own, **draws)
                    assert str(raised.value).startswith(f"row 0: {want}")
                    continue
                drawn = guided_sample(
                    *pair, legal=legal, **own, **draws, truncated_log_probability=True
                )
                assert drawn.tokens.tolist() == [want[0].token], backend
                got = [each.item() for each in drawn[1:]]
                assert got == pytest.approx(want[0][1:], rel=3e-7, abs=1e-12)
                probabilities = truncated_probabilities(*pair, legal=legal, **own)
                assert torch.equal(probabilities[0], want[1]), backend


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **QUIET)
@given(call=calls())
def test_backends_agree(call) -> None:
    check(call)


@pytest.mark.slow
@settings(max_examples=3000, **QUIET)
@given(call=calls())
def test_backends_agree_at_length(call) -> None:
    check(call)
