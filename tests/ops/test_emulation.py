"""The emulation of CUDA: right kernels give what they should, faults show."""

import ctypes
import subprocess
from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.kernels import NVCC
from megatron_jam.ops.guided_sampling import guided_sample
from tests.helpers.kernels import CSRC, EMULATION, INCLUDES, ROOT, compiled, using
from tests.ops.sampling import random_logits

KERNELS = ["reverse", "rotate", "warps", "atomics", "lost_updates", "divergent", "half_a_warp"]
KERNELS += ["unwritten"]
SOURCE = ROOT / "tests" / "ops" / "emulated" / "kernels.cu"
SEEDS = range(20)


@cache
def library() -> ctypes.CDLL:
    # g++ does not know the ending .cu: it is told that this is C++.
    flags = ["-O1", "-shared", "-fPIC", *EMULATION, "-x", "c++"]
    return ctypes.CDLL(
        str(compiled("kernels.so", [SOURCE, CSRC / "emulation" / "emulation.cpp"], *flags))
    )


def run(name: str, values: np.ndarray, *, blocks: int = 1, threads: int, argument=0, seed=0) -> str:
    """Run a kernel on int32 `values`, in place; the emulator's complaint, or nothing."""
    message = ctypes.create_string_buffer(200)
    library().run_kernel(
        KERNELS.index(name),
        blocks,
        threads,
        values.ctypes.data_as(ctypes.c_void_p),
        argument,
        ctypes.c_uint64(seed),
        message,
    )
    return message.value.decode()


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_blocks_and_barriers(threads) -> None:
    for seed in SEEDS:
        values = np.arange(3 * threads, dtype=np.int32)
        assert run("reverse", values, blocks=3, threads=threads, argument=1, seed=seed) == ""
        expected = np.arange(3 * threads).reshape(3, threads)[:, ::-1].ravel()
        assert np.array_equal(values, expected)


def test_a_missing_barrier_shows() -> None:
    wrong = 0
    for seed in SEEDS:
        values = np.arange(64, dtype=np.int32)
        assert run("reverse", values, threads=64, argument=0, seed=seed) == ""
        wrong += not np.array_equal(values, np.arange(64)[::-1])
    assert wrong == len(SEEDS)


@pytest.mark.parametrize(("barriers", "right"), [(2, True), (1, False), (0, False)])
def test_a_thread_may_run_ahead_of_the_others(barriers, right) -> None:
    wrong = 0
    for seed in SEEDS:
        values = np.arange(64, dtype=np.int32)
        expected = values.copy()
        for _ in range(4):
            expected = expected + np.roll(expected, -1)
        assert run("rotate", values, threads=64, argument=barriers, seed=seed) == ""
        wrong += not np.array_equal(values, expected)
    assert wrong == (0 if right else len(SEEDS))


def test_warps_exchange_values() -> None:
    values = np.zeros((65, 64), dtype=np.int32)
    values[0] = np.arange(64)
    assert run("warps", values, threads=64, seed=5) == ""
    for thread in range(64):
        first, lane = thread // 32 * 32, thread % 32
        warp = np.arange(first, first + 32)
        expected = [warp.sum(), warp[: lane + 1].sum(), first + 7]
        expected += [thread + 3 if lane + 3 < 32 else thread]
        votes = sum(1 << i for i, each in enumerate(warp) if each % 3 == 0)
        expected += [np.uint32(votes).astype(np.int32), int(first == 32), 1]
        expected += [thread ^ 1 if lane < 16 else 0]
        assert values[1 + thread, :8].tolist() == [int(each) for each in expected]


def test_atomics_lose_nothing_and_others_do() -> None:
    lost = 0
    for seed in SEEDS:
        values = np.append(np.arange(256), [0, 0]).astype(np.int32)
        assert run("atomics", values, threads=256, seed=seed) == ""
        assert values[256:].tolist() == [255 * 128, 255]
        values = np.zeros(258, dtype=np.int32)
        assert run("lost_updates", values, threads=256, seed=seed) == ""
        assert values[257] == 256
        lost += int(values[256] < 256)
    assert lost == len(SEEDS)


def test_threads_that_wait_for_ever_are_an_error() -> None:
    message = run("divergent", np.zeros(64, dtype=np.int32), threads=64)
    assert message == (
        "threads wait for ever: 32 at a barrier, 0 in a warp's exchange, 32 have left"
    )
    message = run("half_a_warp", np.zeros(64, dtype=np.int32), threads=64)
    assert message == (
        "threads wait for ever: 0 at a barrier, 32 in a warp's exchange, 32 have left"
    )
    # The next kernel runs as if nothing had been.
    values = np.arange(64, dtype=np.int32)
    assert run("reverse", values, threads=64, argument=1) == ""
    assert values.tolist() == list(range(63, -1, -1))


def test_shared_memory_is_not_zero_at_first() -> None:
    values = np.zeros(32, dtype=np.int32)
    run("unwritten", values, threads=32)
    assert values.tolist() == [-1] * 32


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_kernels_are_cuda_too(tmp_path) -> None:
    command = [str(NVCC), "-cubin", "-std=c++20", "-arch=sm_80", *INCLUDES, str(SOURCE)]
    command += ["-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("threads", [32, 64, 224, 512])
def test_a_draw_is_the_same_for_any_order_of_threads_and_any_block(threads) -> None:
    cond, uncond = random_logits(2, 700, seed=1), random_logits(2, 700, seed=2)
    settings = {"guidance_scale": 3.5, "temperature": 4.0, "top_p": 0.4, "top_k": 300}
    draws = {"seed": torch.arange(2), "offset": 3, "truncated_log_probability": True}
    expected = guided_sample(cond, uncond, **settings, **draws)
    for seed in range(6):
        for memory_limit in (227 << 10, 0):  # weights in shared memory, and in global memory
            with using("emulated", threads=threads, memory_limit=memory_limit, seed=seed):
                drawn = guided_sample(cond, uncond, **settings, **draws)
            assert all((one == other).all() for one, other in zip(drawn, expected, strict=True))
