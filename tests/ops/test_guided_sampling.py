"""Guided sampling against its reference, on every backend: values, edges, errors."""

import importlib
import math
import sys

import pytest
import torch
from torch import Tensor

import megatron_jam
from megatron_jam.ops import extension, guided_sampling
from megatron_jam.ops.guided_sampling import guided_sample, truncated_probabilities
from megatron_jam.ops.reference import guided_logits, guided_sample_row, truncated_probabilities_row
from tests.helpers.kernels import BACKENDS, has_backend, using
from tests.ops.sampling import assert_rows, counts_of, random_logits, reference_rows

SETTINGS = [
    {},
    {"guidance_scale": 3.5, "temperature": 0.9, "top_p": 0.9},
    {"guidance_scale": 4.0, "temperature": 2.5, "top_p": 0.5, "top_k": 20},
    {"guidance_scale": 0.0, "temperature": 0.05, "top_p": 0.95, "min_p": 0.2},
    {"guidance_scale": -1.0, "temperature": 6.0, "top_k": 3, "min_p": 0.05, "top_p": 0.9},
    {"guidance_scale": 1.0, "temperature": 1.3, "top_p": 1e-3},
    {"guidance_scale": 2.0, "temperature": 0.0, "top_p": 0.1, "top_k": 1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 2, 37, 128, 1000])
def test_rows_are_those_of_the_reference(backend, dtype, vocabulary) -> None:
    rows = 3
    cond, uncond = (random_logits(rows, vocabulary, seed=seed).to(dtype) for seed in (1, 2))
    mask = random_logits(rows, vocabulary, seed=3) > 0
    mask[:, 0] = True
    seed = torch.tensor([-(2**63), 3, 2**63 - 1])
    for case, settings in enumerate(SETTINGS):
        pair = (cond, uncond) if "guidance_scale" in settings else (cond, None)
        legal = mask if case % 2 else None
        offset = torch.arange(rows) + 2**40 * case
        drawn = guided_sample(
            *pair, legal=legal, seed=seed, offset=offset, truncated_log_probability=True, **settings
        )
        assert_rows(drawn, reference_rows(*pair, legal, seed, offset, **settings))
        probabilities = truncated_probabilities(*pair, legal=legal, **settings)
        for row in range(rows):
            expected = truncated_probabilities_row(
                *(each if each is None else each[row] for each in pair),
                legal=None if legal is None else legal[row],
                **settings,
            )
            assert torch.equal(probabilities[row], expected)


def test_settings_of_each_row_and_a_full_vocabulary(backend) -> None:
    cond, uncond = random_logits(4, 65536, seed=4), random_logits(4, 65536, seed=5)
    settings = {
        "guidance_scale": [1.0, 3.5, 4.0, 0.5],
        "temperature": [1.0, 0.0, 0.7, 1.5],
        "top_p": [1.0, 0.9, 0.8, 0.1],
        "top_k": [0, 5, 70000, 300],
        "min_p": [0.0, 0.0, 1e-4, 1e-9],
    }
    seed, offset = torch.tensor([3, 3, 4, 2**62]), torch.arange(4)
    drawn = guided_sample(
        cond,
        uncond,
        **{name: torch.tensor(each) for name, each in settings.items() if name != "temperature"},
        temperature=torch.tensor(settings["temperature"], dtype=torch.float64),
        seed=seed,
        offset=offset,
        truncated_log_probability=True,
    )
    # float32 tensors hold 0.8 as another number than Python does.
    given = {
        name: torch.tensor(each).double().tolist() if name != "temperature" else each
        for name, each in settings.items()
    }
    given["top_k"] = settings["top_k"]
    assert_rows(drawn, reference_rows(cond, uncond, None, seed, offset, **given))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_range_of_legal_ids_is_a_mask(backend, top_p) -> None:
    cond, uncond = random_logits(3, 1000, seed=21), random_logits(3, 1000, seed=22)
    cond[:, :100], uncond[:, 900:] = math.nan, math.inf  # what is not legal is not read
    ranges = torch.tensor([[100, 900], [131, 132], [640, 897]])
    settings = {"guidance_scale": 3.5, "temperature": 4.0, "top_p": top_p, "top_k": 600}
    draws = {"seed": torch.arange(3), "offset": torch.zeros(3, dtype=torch.int64)}
    ids = torch.arange(1000)
    mask = (ids >= ranges[:, :1]) & (ids < ranges[:, 1:])
    whole = {"truncated_log_probability": True, **settings, **draws}
    by_mask, by_range = (
        guided_sample(cond, uncond, legal=each, **whole) for each in (mask, ranges)
    )
    for one, other in zip(by_mask, by_range, strict=True):
        assert torch.equal(one, other)
    probabilities = [
        truncated_probabilities(cond, uncond, legal=each, **settings) for each in (mask, ranges)
    ]
    assert torch.equal(*probabilities)
    for row, pair in enumerate(ranges.tolist()):
        alone = guided_sample(
            cond[[row]], uncond[[row]], legal=tuple(pair), seed=row, offset=0, **settings
        )
        assert alone.tokens.item() == by_mask.tokens[row]


def test_golden_draws_do_not_change(backend) -> None:
    cond = (torch.arange(4 * 256).reshape(4, 256) * 37 % 101).float() / 8
    uncond = (torch.arange(4 * 256).reshape(4, 256) * 53 % 89).float() / 8
    drawn = guided_sample(
        cond,
        uncond,
        guidance_scale=3.5,
        temperature=8.0,
        top_p=0.9,
        seed=torch.full((4,), 7),
        offset=torch.arange(4),
        truncated_log_probability=True,
    )
    assert drawn.tokens.tolist() == [191, 216, 1, 70]
    assert_rows(
        drawn,
        list(zip([191, 216, 1, 70], GOLDEN_LOG_PROBABILITIES, GOLDEN_TRUNCATED, strict=True)),
    )


GOLDEN_LOG_PROBABILITIES = [-5.272365373, -3.366530192, -4.626087501, -2.737191971]
GOLDEN_TRUNCATED = [-5.17026433, -3.26298142, -4.524077316, -2.637758131]


def test_ties_stay_together_in_a_tiny_nucleus(backend) -> None:
    logits = torch.tensor([1.0, 5.0, 5.0, 2.0])
    for settings in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        counts = counts_of(logits, num=500, **settings)
        assert counts[[0, 3]].tolist() == [0, 0]
        assert min(counts[[1, 2]].tolist()) > 180
        assert truncated_probabilities(logits[None], **settings).tolist() == [[0, 0.5, 0.5, 0]]


def test_rows_all_of_one_value_and_of_one_legal_id(backend) -> None:
    flat = torch.full((1, 50), -3.25)
    assert torch.equal(truncated_probabilities(flat, top_p=0.1), torch.full((1, 50), 0.02))
    legal = torch.zeros(50, dtype=torch.bool)
    legal[17] = True
    for temperature in (0.0, 1e-30, 1.0, 1e30):
        drawn = guided_sample(
            flat, temperature=temperature, top_p=0.1, legal=legal, seed=1, offset=2
        )
        assert (drawn.tokens.item(), drawn.log_probability.item()) == (17, 0.0)


def test_draw_depends_on_its_row_seed_and_offset_alone(backend) -> None:
    cond, uncond = random_logits(64, 500, seed=8), random_logits(64, 500, seed=9)
    settings = {"guidance_scale": 3.5, "top_p": 0.9}
    draws = {"seed": torch.full((64,), 5), "offset": torch.arange(64) * 7}
    tokens = guided_sample(cond, uncond, **draws, **settings).tokens
    alone = [
        guided_sample(cond[[row]], uncond[[row]], seed=5, offset=7 * row, **settings).tokens.item()
        for row in range(64)
    ]
    assert tokens.tolist() == alone
    if backend != "emulated":  # whose threads are this thread's fibers
        torch.set_num_threads(2)
        assert torch.equal(tokens, guided_sample(cond, uncond, **draws, **settings).tokens)
        torch.set_num_threads(1)
    for name in draws:
        others = {**draws, name: draws[name] + 1}
        assert not torch.equal(tokens, guided_sample(cond, uncond, **others, **settings).tokens)


def test_rows_may_have_any_strides(backend) -> None:
    wide = random_logits(6, 3, 50, seed=10)
    settings = {"top_p": 0.9, "seed": torch.full((6,), 5), "offset": torch.arange(6)}
    tokens = guided_sample(wide[:, 1].contiguous(), **settings).tokens
    assert torch.equal(tokens, guided_sample(wide[:, 1], **settings).tokens)
    columns = wide[:, 1].T.contiguous().T
    assert columns.stride() == (1, 6)
    assert torch.equal(tokens, guided_sample(columns, **settings).tokens)
    assert (
        guided_sample(wide[:0, 1], seed=torch.empty(0, dtype=torch.int64), offset=0)[0].numel() == 0
    )


def test_greedy_takes_the_largest_and_the_lower_id_of_equals(backend) -> None:
    cond = random_logits(8, 300, seed=12)
    draws = {"temperature": 0.0, "seed": torch.zeros(8, dtype=torch.int64), "offset": 0}
    assert torch.equal(guided_sample(cond, **draws).tokens, cond.argmax(dim=1))
    cond[:, [5, 100, 299]] = 50.0
    assert guided_sample(cond, **draws).tokens.tolist() == [5] * 8
    legal = torch.ones(300, dtype=torch.bool)
    legal[5] = False
    drawn = guided_sample(cond, legal=legal, **draws)
    assert drawn.tokens.tolist() == [100] * 8
    assert drawn.log_probability.tolist() == [0.0] * 8
    probabilities = truncated_probabilities(cond, temperature=0.0, legal=legal)
    assert torch.equal(probabilities, torch.eye(300)[[100] * 8])


def test_one_stream_may_forbid_an_id(backend) -> None:
    cond, uncond = random_logits(2, 300, seed=13)
    cond[3], uncond[7] = -math.inf, -math.inf
    cond[4] = uncond[4] = -math.inf
    for scale in (3.5, 1.0, 0.0, -2.0):
        probabilities = truncated_probabilities(
            cond[None], uncond[None], guidance_scale=scale, temperature=30.0
        )
        assert (probabilities[0] == 0).nonzero().flatten().tolist() == [3, 4, 7]
        logits = guided_logits(cond, uncond, guidance_scale=scale, legal=None)
        assert (logits == -math.inf).nonzero().flatten().tolist() == [3, 4, 7]


def test_illegal_ids_may_hold_anything(backend) -> None:
    cond = torch.tensor([math.nan, 1.0, math.inf, 1.0, -math.inf] * 60)
    legal = torch.tensor([False, True, False, True, False] * 60)
    counts = counts_of(cond, num=1000, legal=legal)
    assert counts[legal].sum() == 1000


@pytest.mark.parametrize("vocabulary", [10, 700])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "a logit of a legal id is NaN or \\+inf"),
        (math.inf, "a logit of a legal id is NaN or \\+inf"),
        (-math.inf, "no legal id has a logit above -inf"),
    ],
)
def test_a_row_without_a_largest_logit_is_named(backend, value, message, vocabulary) -> None:
    cond = random_logits(4, vocabulary, seed=14)
    cond[2, :] = value
    rows = [(cond, None)]
    if value != -math.inf:
        cond[2, : vocabulary - 3], cond[2, vocabulary - 2 :] = 0.0, 1.0  # one alone
        rows.append((torch.zeros_like(cond), cond))
    seed = torch.arange(4)
    for pair in rows:
        guided = {} if pair[1] is None else {"guidance_scale": -1.0 if value == math.inf else 2.0}
        for temperature in (0.0, 1.0):
            settings = {"temperature": temperature, **guided}
            with pytest.raises(ValueError, match=f"row 2: {message}"):
                guided_sample(*pair, seed=seed, offset=0, **settings)
            with pytest.raises(ValueError, match=f"row 2: {message}"):
                truncated_probabilities(*pair, **settings)
            row = [each if each is None else each[2] for each in pair]
            with pytest.raises(ValueError, match=message):
                guided_sample_row(*row, seed=0, offset=0, **settings)


def test_an_empty_legal_set_is_named(backend) -> None:
    legal = torch.ones(3, 10, dtype=torch.bool)
    legal[1] = False
    cond, draws = torch.zeros(3, 10), {"seed": torch.arange(3), "offset": 0}
    for empty in (legal, torch.tensor([[0, 9], [4, 4], [0, 1]])):
        with pytest.raises(ValueError, match="row 1: no legal id"):
            guided_sample(cond, legal=empty, **draws)
    for wrong in ([0, 11], [-1, 3], [5, 4]):
        ranges = torch.tensor([[0, 9], [4, 5], wrong])
        with pytest.raises(ValueError, match="row 2: the range of legal ids"):
            guided_sample(cond, legal=ranges, **draws)
        with pytest.raises(ValueError, match="row 2: the range of legal ids"):
            truncated_probabilities(cond, legal=ranges)
        with pytest.raises(ValueError, match="row 0: the range of legal ids"):
            guided_sample(cond, legal=tuple(wrong), **draws)


@pytest.mark.parametrize(
    "setting",
    [
        *({"top_p": value} for value in (0.0, 1.1, -1.0, math.nan)),
        *({"temperature": value} for value in (-0.1, math.inf, math.nan)),
        *({"guidance_scale": value} for value in (math.inf, math.nan)),
        *({"min_p": value} for value in (-0.1, 1.01, math.nan)),
        {"top_k": -1},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_an_error(backend, setting) -> None:
    logits = torch.zeros(2, 10)
    message = "temperature must be >= 0, top_p in"
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        guided_sample(logits, logits, **setting, seed=torch.arange(2), offset=0)
    name, value = next(iter(setting.items()))
    right = {"guidance_scale": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    one_wrong = torch.tensor([right[name], value], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        truncated_probabilities(logits, logits, **{name: one_wrong})
    with pytest.raises(ValueError, match=message):
        guided_sample_row(logits[0], logits[0], **setting, seed=0, offset=0)


def test_half_a_top_k_is_an_error(backend) -> None:
    with pytest.raises(ValueError, match=r"row 1: .* top_k a whole number"):
        truncated_probabilities(torch.zeros(2, 10), top_k=torch.tensor([2.0, 2.5]))


def test_wrong_arguments_are_named() -> None:
    cond, draws = torch.zeros(2, 10), {"seed": torch.arange(2), "offset": torch.arange(2)}
    for message, arguments in {
        "uncond has shape": {"uncond": torch.zeros(2, 9)},
        "uncond is": {"uncond": torch.zeros(2, 10, dtype=torch.float16)},
        "guidance_scale needs uncond": {"guidance_scale": 2.0},
        "legal is": {"legal": torch.ones(10)},
        "legal has shape": {"legal": torch.zeros(2, 3, dtype=torch.int64)},
        "would share one stream": {"seed": 3},
        "a setting has shape": {"top_p": torch.ones(3)},
    }.items():
        with pytest.raises(ValueError, match=message):
            guided_sample(cond, **{**draws, **arguments})
    with pytest.raises(ValueError, match=r"not \[rows, V\]"):
        guided_sample(cond[0], seed=0, offset=0)
    with pytest.raises(ValueError, match="logits must be float32, bfloat16 or float16"):
        guided_sample(cond.double(), **draws)
    with pytest.raises(ValueError, match="sums are exact up to 131072"):
        guided_sample(torch.zeros(1, 2**17 + 1), seed=0, offset=0)


def test_operators_pass_torchs_checks_and_compile_as_one_graph() -> None:
    cond = random_logits(3, 20, seed=15)
    numbers = (2.0, 1.0, 0.9, 0, 0.0, None, 0, 20, None)
    for operator, more in {
        "guided_sample": (1, 2, torch.ones(3, 2, dtype=torch.int64), True),
        "guided_probabilities": (),
        "guided_largest": (),
        "guided_weights": (torch.full((3,), 9.0),),
    }.items():
        torch.library.opcheck(
            getattr(torch.ops.megatron_jam, operator).default,
            (cond, cond, *numbers, *more),
            test_utils=("test_schema", "test_faketensor"),
        )
    compiled = torch.compile(guided_sample, backend="eager", fullgraph=True)
    draws = {"seed": torch.arange(3), "offset": 4}
    for top_p in (0.9, torch.tensor([0.1, 0.5, 1.0])):
        arguments = {**draws, "top_p": top_p}
        expected = guided_sample(cond, **arguments)
        assert torch.equal(compiled(cond, **arguments).tokens, expected.tokens)


def test_the_fastest_backend_is_taken() -> None:
    fastest = next(name for name in BACKENDS if has_backend(name))
    cond, draws = random_logits(1, 1000, seed=23), {"top_p": 0.9, "seed": 1, "offset": 2}
    with using(fastest):
        expected = guided_sample(cond, **draws)
    assert all(map(torch.equal, guided_sample(cond, **draws)[:2], expected[:2]))


def test_a_missing_extension_says_what_to_do(monkeypatch) -> None:
    monkeypatch.delattr(megatron_jam, "_C")
    monkeypatch.setitem(sys.modules, "megatron_jam._C", None)
    with pytest.raises(ImportError, match="run `make setup`"):
        importlib.reload(extension)


def test_a_gpu_without_a_kernel_gets_the_tokens_of_the_cpu(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(guided_sampling.logger, "info", said.append)
    guided_sampling._say_once.cache_clear()
    cond = random_logits(4, 100, seed=20)
    draws = torch.stack([torch.full((4,), 3), torch.arange(4)], dim=1)
    arguments = (None, 1.0, 1.0, 0.9, 0, 0.0, None, 0, 100, None)
    expected = guided_sample(cond, top_p=0.9, seed=draws[:, 0], offset=draws[:, 1])
    for _ in range(2):
        tokens, *_ = guided_sampling._on_cpu("guided_sample", cond, *arguments, 0, 0, draws, False)
        assert torch.equal(tokens, expected.tokens)
    probabilities = guided_sampling._on_cpu("guided_probabilities", cond, *arguments)
    assert torch.equal(probabilities, truncated_probabilities(cond, top_p=0.9))
    assert said == ["the extension was built without CUDA: tokens are drawn on the CPU"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("vocabulary", [1, 100, 8192, 65536, 2**17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_draws_what_the_cpu_draws(vocabulary, dtype) -> None:
    def on(device: str) -> list[Tensor]:
        pair = [random_logits(16, vocabulary, seed=seed).to(device, dtype) for seed in (16, 17)]
        draws = {"seed": torch.arange(16, device=device), "offset": 5}
        results = []
        for settings in SETTINGS[1:]:
            drawn = guided_sample(*pair, **settings, **draws, truncated_log_probability=True)
            results += [*drawn, truncated_probabilities(*pair, **settings)]
        return results

    for index, (gpu, cpu) in enumerate(zip(on("cuda"), on("cpu"), strict=True)):
        if index % 4 in (0, 3):  # tokens and probabilities, to the bit
            assert torch.equal(gpu.cpu(), cpu)
        else:
            torch.testing.assert_close(gpu.cpu(), cpu, rtol=3e-7, atol=1e-12)
