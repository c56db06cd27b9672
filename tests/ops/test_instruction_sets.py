"""Kernels that are compiled for several sets of instructions give the same in each.

The extension takes the best set that the processor has, so that another one would go untested.
"""

import ctypes
import hashlib
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_jam.ops import reference
from megatron_jam.ops.extension import has_sha_lanes
from megatron_jam.ops.sha256 import LANES
from tests.helpers.kernels import INCLUDES, compiled

SOURCE = Path(__file__).parent / "instruction_sets.cpp"
ON_X86 = ["x86-64", "x86-64-v3", "x86-64-v4"]


@pytest.fixture(scope="module", params=ON_X86 if platform.machine() == "x86_64" else [""])
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    if request.param == "x86-64-v4" and not has_sha_lanes():
        pytest.skip("needs a processor with AVX-512")
    chosen = [f"-march={request.param}"] if request.param else []
    flags = ["-O3", *chosen, "-Wno-psabi", "-shared", "-fPIC", *INCLUDES]
    return ctypes.CDLL(str(compiled(f"kernels {request.param}.so", [SOURCE], *flags)))


@pytest.mark.parametrize("kind", ["normal", "cut_normal"])
def test_draws_equal_the_reference(kernels: ctypes.CDLL, kind: str) -> None:
    key, start, count = 12345, 61, 1000
    found = np.empty(count, dtype=np.float32)
    getattr(kernels, f"draw_{kind}")(
        ctypes.c_void_p(found.ctypes.data),
        *(ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint64(key), ctypes.c_float(0.02)),
    )
    assert np.array_equal(found, reference.drawn(kind, key, start, count, 0.02))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_averages_equal_the_reference(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Over all finite numbers of 16 bits."""
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    a = every[every.isfinite()]
    b = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))]
    found = torch.empty_like(a)
    share = 0.25  # a float32, so that C's float says the same
    getattr(kernels, f"average_{str(dtype).removeprefix('torch.')}")(
        *(ctypes.c_void_p(each.data_ptr()) for each in (a, b, found)),
        *(ctypes.c_int64(len(a)), ctypes.c_float(share)),
    )
    due = reference.weighted_average(a, b, share)
    assert torch.equal(found.view(torch.int16), due.view(torch.int16))


def test_digests_are_hashlibs(kernels: ctypes.CDLL) -> None:
    """The state after whole blocks, of which the last holds the message's end."""
    length = 3 * 64 - 9
    messages = np.random.default_rng(0).integers(0, 256, (LANES, length), dtype=np.uint8)
    end = b"\x80" + (8 * length).to_bytes(8, "big")
    padded = [each.tobytes() + end for each in messages]
    first = first_state()
    states = np.repeat(first[:, None], LANES, axis=1)
    pointers = (ctypes.c_char_p * LANES)(*padded)
    kernels.sha256_update(ctypes.c_void_p(states.ctypes.data), pointers, ctypes.c_int64(3))
    found = [states[:, lane].astype(">u4").tobytes() for lane in range(LANES)]
    assert found == [hashlib.sha256(each.tobytes()).digest() for each in messages]


def first_state() -> np.ndarray:
    """SHA-256's first state: the fractions of the square roots of the first eight primes."""
    roots = np.sqrt(np.array([2, 3, 5, 7, 11, 13, 17, 19], dtype=np.float64))
    return (np.modf(roots)[0] * 2**32).astype(np.uint32)
