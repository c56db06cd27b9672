"""Guided sampling against its reference, its exact distribution, and Hugging Face's top-p."""

import importlib
import math
import sys

import pytest
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

import megatron_jam
from megatron_jam.ops import extension, guided_sampling
from megatron_jam.ops.guided_sampling import guided_sample
from megatron_jam.ops.reference import guided_logits, guided_sample_row, sampling_weights


def random_logits(*shape: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def reference_tokens(cond: Tensor, uncond: Tensor | None, legal: Tensor | None, **settings) -> list:
    offset = settings.pop("offset")
    return [
        guided_sample_row(
            cond[row],
            None if uncond is None else uncond[row],
            legal=None if legal is None else legal[row],
            offset=int(offset[row]),
            **settings,
        )
        for row in range(len(cond))
    ]


def draws(cond: Tensor, uncond: Tensor | None = None, *, num: int, **settings) -> Tensor:
    """`num` draws from one row, as counts per id."""
    rows = cond.expand(num, -1)
    others = None if uncond is None else uncond.expand(num, -1)
    tokens = guided_sample(rows, others, seed=11, offset=torch.arange(num), **settings)
    return torch.bincount(tokens, minlength=cond.shape[-1])


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """By definition: kept if the mass of strictly larger weights is below top_p."""
    larger = torch.stack([weights[weights > weight].sum() for weight in weights])
    return (larger < top_p * weights.sum()) & (weights > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 2, 37, 1000, 8192])
@pytest.mark.parametrize("guided", [False, True])
def test_tokens_are_those_of_the_reference(dtype, vocabulary, guided) -> None:
    num_rows = 5
    cond = random_logits(num_rows, vocabulary, seed=1).to(dtype)
    uncond = random_logits(num_rows, vocabulary, seed=2).to(dtype) if guided else None
    mask = random_logits(num_rows, vocabulary, seed=3) > 0
    mask[:, 0] = True
    for case, (guidance, temperature, top_p) in enumerate(
        [(1.0, 1.0, 1.0), (3.5, 0.9, 0.9), (4.0, 2.5, 0.5), (0.0, 0.05, 0.95), (-1.0, 1.3, 1e-3)]
    ):
        for legal in (None, mask):
            settings = {
                "guidance_scale": guidance if guided else 1.0,
                "temperature": temperature,
                "top_p": top_p,
                "seed": -(2**63) + case,
                "offset": torch.arange(num_rows) + 2**40 * case,
            }
            tokens = guided_sample(cond, uncond, legal=legal, **settings)
            assert tokens.dtype == torch.int64
            assert tokens.tolist() == reference_tokens(cond, uncond, legal, **settings)


def test_settings_of_each_row_and_a_full_vocabulary() -> None:
    cond, uncond = random_logits(4, 65536, seed=4), random_logits(4, 65536, seed=5)
    scales, temperatures, top_ps = [1.0, 3.5, 4.0, 0.5], [1.0, 0.0, 0.7, 1.5], [1.0, 0.9, 0.8, 0.1]
    seeds = [3, 3, 4, 2**62]
    tokens = guided_sample(
        cond,
        uncond,
        guidance_scale=torch.tensor(scales),
        temperature=torch.tensor(temperatures, dtype=torch.float64),
        top_p=torch.tensor(top_ps, dtype=torch.float64),
        seed=torch.tensor(seeds),
        offset=torch.arange(4),
    )
    assert tokens.tolist() == [
        guided_sample_row(
            cond[row],
            uncond[row],
            guidance_scale=scales[row],
            temperature=temperatures[row],
            top_p=top_ps[row],
            seed=seeds[row],
            offset=row,
        )
        for row in range(4)
    ]


def test_golden_tokens_do_not_change() -> None:
    cond = (torch.arange(4 * 256).reshape(4, 256) * 37 % 101).float() / 8
    uncond = (torch.arange(4 * 256).reshape(4, 256) * 53 % 89).float() / 8
    tokens = guided_sample(
        cond, uncond, guidance_scale=3.5, temperature=8.0, top_p=0.9, seed=7, offset=torch.arange(4)
    )
    assert tokens.tolist() == [191, 216, 1, 70]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("shape", ["peaked", "flat", "bimodal"])
def test_draws_follow_the_exact_probabilities(top_p, guidance, shape) -> None:
    noise = random_logits(2, 60, seed=6, spread=1.0)
    cond, uncond = {
        "peaked": noise * 4,
        "flat": noise * 0.1,
        "bimodal": noise * 0.3 + 3 * (torch.arange(60) % 2),
    }[shape]
    num = 20_000
    counts = draws(cond, uncond, num=num, guidance_scale=guidance, top_p=top_p)
    # An independent float64 softmax; the nucleus is by definition.
    blended = uncond.double() + guidance * (cond.double() - uncond.double())
    probabilities = blended.softmax(0)
    kept = nucleus(probabilities, top_p)
    assert counts[~kept].sum() == 0
    assert_chi_squared(counts[kept], probabilities[kept] / probabilities[kept].sum() * num)


def assert_chi_squared(counts: Tensor, expected: Tensor) -> None:
    """Chi-squared below its quantile of 1 - 3e-7; cells of few expected counts are one cell."""
    rare = expected < 10
    counts = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    cells = expected > 0
    statistic = float(((counts - expected)[cells].square() / expected[cells]).sum())
    freedom = max(int(cells.sum()) - 1, 1)
    # Wilson and Hilferty's cube, at five standard deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-squared {statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.95])
def test_support_is_that_of_hugging_face(top_p) -> None:
    for seed in range(5):
        logits = random_logits(24, seed=seed, spread=1.0)
        kept = TopPLogitsWarper(top_p)(None, (logits / 0.8)[None])[0] > -math.inf
        assert torch.equal(nucleus(sampling_weights(logits, temperature=0.8), top_p), kept)
        counts = draws(logits, num=20_000, temperature=0.8, top_p=top_p)
        assert torch.equal(counts > 0, kept)


def test_ties_stay_together_in_a_tiny_nucleus() -> None:
    counts = draws(torch.tensor([1.0, 5.0, 5.0, 2.0]), num=2000, top_p=1e-9)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert min(counts[[1, 2]].tolist()) > 800


def test_draw_depends_on_its_row_seed_and_offset_alone() -> None:
    cond, uncond = random_logits(64, 500, seed=8), random_logits(64, 500, seed=9)
    settings = {"guidance_scale": 3.5, "top_p": 0.9, "seed": 5}
    offset = torch.arange(64) * 7
    tokens = guided_sample(cond, uncond, offset=offset, **settings)
    alone = [
        guided_sample(cond[[row]], uncond[[row]], offset=int(offset[row]), **settings).item()
        for row in range(64)
    ]
    assert tokens.tolist() == alone
    torch.set_num_threads(2)
    assert torch.equal(tokens, guided_sample(cond, uncond, offset=offset, **settings))
    torch.set_num_threads(1)
    assert not torch.equal(tokens, guided_sample(cond, uncond, offset=offset + 1, **settings))
    assert not torch.equal(
        tokens, guided_sample(cond, uncond, offset=offset, **{**settings, "seed": 6})
    )


def test_rows_may_have_any_strides() -> None:
    wide = random_logits(6, 3, 50, seed=10)
    settings = {"top_p": 0.9, "seed": 5, "offset": torch.arange(6)}
    tokens = guided_sample(wide[:, 1].contiguous(), **settings)
    assert torch.equal(tokens, guided_sample(wide[:, 1], **settings))
    columns = wide[:, 1].T.contiguous().T
    assert columns.stride() == (1, 6)
    assert torch.equal(tokens, guided_sample(columns, **settings))


def test_greedy_takes_the_largest_and_the_lower_id_of_equals() -> None:
    cond = random_logits(8, 300, seed=12)
    offset = torch.arange(8)
    assert torch.equal(
        guided_sample(cond, temperature=0.0, seed=0, offset=offset), cond.argmax(dim=1)
    )
    cond[:, [5, 100, 299]] = 50.0
    assert guided_sample(cond, temperature=0.0, seed=0, offset=offset).tolist() == [5] * 8
    legal = torch.ones(300, dtype=torch.bool)
    legal[5] = False
    tokens = guided_sample(cond, temperature=0.0, legal=legal, seed=0, offset=offset)
    assert tokens.tolist() == [100] * 8


def test_one_stream_may_forbid_an_id() -> None:
    cond, uncond = random_logits(2, 20, seed=13)
    cond[3], uncond[7] = -math.inf, -math.inf
    cond[4] = uncond[4] = -math.inf
    counts = draws(cond, uncond, num=5000, guidance_scale=3.5, temperature=9.0)
    assert counts[[3, 4, 7]].tolist() == [0, 0, 0]
    assert (counts > 0).sum() == 17
    logits = guided_logits(cond, uncond, guidance_scale=0.0, legal=None)
    assert (logits == -math.inf).nonzero().flatten().tolist() == [3, 4, 7]


def test_illegal_ids_may_hold_anything() -> None:
    cond = torch.tensor([math.nan, 1.0, math.inf, 1.0, -math.inf])
    legal = torch.tensor([False, True, False, True, False])
    counts = draws(cond, num=1000, legal=legal)
    assert counts[[1, 3]].sum() == 1000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "a logit of a legal id is NaN or \\+inf"),
        (math.inf, "a logit of a legal id is NaN or \\+inf"),
        (-math.inf, "no legal id has a logit above -inf"),
    ],
)
def test_a_row_without_a_largest_logit_is_named(value, message) -> None:
    cond = random_logits(4, 10, seed=14)
    cond[2] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"row 2: {message}"):
            guided_sample(cond, temperature=temperature, seed=0, offset=torch.arange(4))
        with pytest.raises(ValueError, match=message):
            guided_sample_row(
                cond[2], guidance_scale=1, temperature=temperature, top_p=1, seed=0, offset=0
            )


def test_an_empty_legal_set_is_named() -> None:
    legal = torch.ones(3, 10, dtype=torch.bool)
    legal[1] = False
    with pytest.raises(ValueError, match="row 1: no legal id"):
        guided_sample(torch.zeros(3, 10), legal=legal, seed=0, offset=torch.arange(3))


@pytest.mark.parametrize(
    "setting",
    [
        *({"top_p": value} for value in (0.0, 1.1, -1.0, math.nan)),
        *({"temperature": value} for value in (-0.1, math.inf, math.nan)),
        *({"guidance_scale": value} for value in (math.inf, math.nan)),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_an_error(setting) -> None:
    logits = torch.zeros(1, 10)
    with pytest.raises(ValueError, match="row 0: temperature must be >= 0, top_p in"):
        guided_sample(logits, logits, **setting, seed=0, offset=0)
    settings = {"guidance_scale": 1.0, "temperature": 1.0, "top_p": 1.0, **setting}
    with pytest.raises(ValueError, match="temperature must be >= 0, top_p in"):
        guided_sample_row(logits[0], logits[0], **settings, seed=0, offset=0)


def test_wrong_arguments_are_named() -> None:
    cond, offset = torch.zeros(2, 10), torch.arange(2)
    for message, arguments in {
        "uncond has shape": {"uncond": torch.zeros(2, 9)},
        "uncond is": {"uncond": torch.zeros(2, 10, dtype=torch.float16)},
        "guidance_scale needs uncond": {"guidance_scale": 2.0},
        "legal is": {"legal": torch.ones(10)},
        "would share one random number": {"offset": 3},
    }.items():
        with pytest.raises(ValueError, match=message):
            guided_sample(cond, **{"seed": 0, "offset": offset, **arguments})
    with pytest.raises(ValueError, match=r"not \[rows, V\]"):
        guided_sample(cond[0], seed=0, offset=0)
    with pytest.raises(ValueError, match="logits must be float32, bfloat16 or float16"):
        guided_sample(cond.double(), seed=0, offset=offset)
    with pytest.raises(ValueError, match="sums are exact up to 131072"):
        guided_sample(torch.zeros(1, 2**17 + 1), seed=0, offset=0)


def test_operator_passes_torchs_checks_and_compiles_as_one_graph() -> None:
    cond, setting, count = random_logits(3, 20, seed=15), torch.ones(3).double(), torch.arange(3)
    torch.library.opcheck(
        torch.ops.megatron_jam.guided_sample,
        (cond, cond, setting, setting, setting, None, count, count),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(guided_sample, backend="eager", fullgraph=True)
    arguments = {"top_p": 0.9, "seed": 3, "offset": count}
    assert torch.equal(compiled(cond, **arguments), guided_sample(cond, **arguments))


def test_a_missing_extension_says_what_to_do(monkeypatch) -> None:
    monkeypatch.delattr(megatron_jam, "_C")
    monkeypatch.setitem(sys.modules, "megatron_jam._C", None)
    with pytest.raises(ImportError, match="run `make setup`"):
        importlib.reload(extension)


def test_a_gpu_without_a_kernel_gets_the_tokens_of_the_cpu(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(guided_sampling.logger, "info", said.append)
    guided_sampling._say_once.cache_clear()
    rows = [torch.full((4,), x, dtype=torch.float64) for x in (1.0, 1.0, 0.9)]
    draws = torch.full((4,), 3), torch.arange(4)
    cond = random_logits(4, 100, seed=20)
    expected = guided_sample(cond, top_p=0.9, seed=3, offset=draws[1])
    for _ in range(2):
        assert torch.equal(guided_sampling._on_cpu(cond, None, *rows, None, *draws), expected)
    assert said == ["the extension was built without CUDA: tokens are drawn on the CPU"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_draws_the_tokens_of_the_cpu() -> None:
    for vocabulary in (1, 100, 8192, 65536):
        cond = random_logits(16, vocabulary, seed=16)
        uncond = random_logits(16, vocabulary, seed=17)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            pair = cond.to(dtype), uncond.to(dtype)
            settings = {"guidance_scale": 3.5, "top_p": 0.9, "seed": 1}
            tokens = guided_sample(*pair, offset=torch.arange(16), **settings)
            pair = [logits.cuda() for logits in pair]
            on_gpu = guided_sample(*pair, offset=torch.arange(16).cuda(), **settings)
            assert torch.equal(on_gpu.cpu(), tokens)
