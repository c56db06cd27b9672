"""What prepare_megatron promises: Megatron's CUDA is the CPU, everybody else's torch is torch."""

from typing import Any

import pytest
import torch

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World
from tests.helpers.pool import WorkerPool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="patches nothing with a GPU")


def what_megatron_sees(world: World) -> dict[str, Any]:
    """Tensors and devices through the global names of Megatron's modules."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    seen = param_and_grad_buffer.torch
    moved = torch.ones(2)
    random_state = torch.get_rng_state()
    return {
        "stand-in": seen is not torch and schedules.torch is seen,
        "zeros": str(seen.zeros(3, device="cuda").device),
        "empty": str(seen.empty(3, device=seen.cuda.current_device()).device),
        "tensor": seen.tensor([1.5], device=torch.device("cuda", 0)).tolist(),
        "dtype": str(seen.zeros(1, dtype=seen.bfloat16, device="cuda").dtype),
        "same types": seen.Tensor is torch.Tensor and seen.nn is torch.nn,
        "cuda method": moved.cuda() is moved,
        "type name": (torch.ones(1).type(), torch.ones(1, dtype=torch.bfloat16).type()),
        "type cast": str(torch.ones(1).type(torch.float64).dtype),
        "random": torch.equal(random._get_cuda_rng_state(), random_state),
        "adam": distrib_optimizer.Adam.__module__,
    }


def test_megatron_sees_the_cpu(pool: WorkerPool) -> None:
    (seen,) = pool.run(what_megatron_sees, ParallelConfig())
    assert seen == {
        "stand-in": True,
        "zeros": "cpu",
        "empty": "cpu",
        "tensor": [1.5],
        "dtype": "torch.bfloat16",
        "same types": True,
        "cuda method": True,
        "type name": ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"),
        "type cast": "torch.float64",
        "random": True,
        "adam": "megatron_jam.parallel.adam",
    }


def what_others_see(world: World) -> dict[str, Any]:
    """The process's own torch after the patches, and a second call's effect."""
    import sys

    from megatron.core.distributed import param_and_grad_buffer

    from megatron_jam.parallel.cpu import prepare_megatron

    before = param_and_grad_buffer.torch
    prepare_megatron()
    try:
        torch.zeros(1, device="cuda")
        refusal = ""
    except (RuntimeError, AssertionError) as error:
        refusal = type(error).__name__
    return {
        "torch": sys.modules["torch"] is torch and torch.__file__ is not None,
        "cuda": sys.modules["torch.cuda"] is torch.cuda and not torch.cuda.is_available(),
        "real factory refuses": refusal != "",
        "ours": world.__class__.__module__ == "megatron_jam.parallel.world",
        "second call": param_and_grad_buffer.torch is before,
        "device": str(world.device),
    }


def test_everybody_else_keeps_the_real_torch(pool: WorkerPool) -> None:
    (seen,) = pool.run(what_others_see, ParallelConfig())
    device = seen.pop("device")
    assert device == "cpu"
    assert all(seen.values()), seen
