"""Make Megatron-Core run on a CPU with gloo, and resume without apex. The only file that patches.

Megatron-Core asks `torch.cuda` for devices, streams and random states wherever it goes. Its modules
reach all of it through their global name `torch`, so each of them is given a stand-in for that
module whose CUDA is the CPU. Everybody else keeps the real torch: nothing global changes but the
two tensor methods named below, and on a machine with a GPU none of this runs but the functions
named provide_*.
"""

import importlib
import logging
import os
import pkgutil
import queue
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")

# Imported before patching: Megatron imports these inside functions, after it has started.
_LATE_PACKAGES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies",
    "megatron.core.distributed",
    "megatron.core.models.common",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer",
)
# Need packages that are not installed here, and are not used.
_SKIP = ("flextron", "hybrid", "cuda_graphs", "fsdp", "emerging", "cpu_offloading")


class _Stream:
    """A stream or event on which everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def query(self) -> bool:
        return True


class _Cuda(ModuleType):
    """Stand-in for `torch.cuda`: one device, the CPU; streams do nothing."""

    Stream = Event = _Stream

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.current_device = lambda: CPU
        self.current_stream = self.default_stream = lambda *_, **__: _Stream()
        self.stream = lambda *_, **__: nullcontext()
        self.synchronize = self.set_device = self.empty_cache = lambda *_, **__: None
        self.is_current_stream_capturing = self.is_initialized = lambda: False
        self.memory_allocated = self.max_memory_allocated = lambda *_, **__: 0
        self.get_rng_state = lambda *_, **__: torch.get_rng_state()
        self.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        self.manual_seed = torch.manual_seed

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(ModuleType):
    """Stand-in for `torch` in Megatron's modules: factories put "cuda" tensors on the CPU."""

    FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda()
        for name in self.FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and "cuda" in str(kwargs["device"]):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


@cache
def prepare_megatron() -> None:
    """Patch Megatron-Core for a process that computes on the CPU; a second call does nothing."""
    for package in _LATE_PACKAGES:
        _import_modules(package)
    stand_in = _Torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    _patch_random_state()
    _patch_tensor_methods()
    _provide_weight_gradients()


def _import_modules(package: str) -> None:
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__, package + "."):
        if not info.ispkg and not any(word in info.name for word in _SKIP):
            try:
                importlib.import_module(info.name)
            except ImportError:
                continue  # an optional part whose packages are not installed


def _patch_random_state() -> None:
    """Recomputation and dropout save and restore the CPU's generator in place of a GPU's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It warns if dropout on a GPU has drawn from the CPU's generator, which here it must.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_tensor_methods() -> None:
    """The optimizer recognises dtypes by CUDA type names, and moves tensors with `.cuda()`."""
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        name = plain_type(self)
        # Megatron checks for float32 by name and has no name for float64, which our tests use.
        return "torch.cuda." + name.split(".")[-1].replace("Double", "Float")

    torch.Tensor.type = type_  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


class _WeightGradients:
    """apex's kernel that adds a weight's gradient [out, in] to its sum within the product."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        inputs: torch.Tensor, slopes: torch.Tensor, total: torch.Tensor
    ) -> None:
        """Add what inputs [T, in] and slopes [T, out] give to `total`, in fp32."""
        if inputs.dtype is total.dtype:
            total.addmm_(slopes.t(), inputs)
        else:
            total += slopes.t() @ inputs


def _provide_weight_gradients() -> None:
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = _WeightGradients
    layers._grad_accum_fusion_available = True


class WriterResults:
    """A queue of one item between a process and those it forks: a file in memory."""

    def __init__(self) -> None:
        self._file = Connection(os.memfd_create("writer results"))

    def put(self, value: Any) -> None:
        """Leave `value` for the process that made this queue."""
        self._file.send(value)

    def get_nowait(self) -> Any:
        """What was left; `queue.Empty` if nothing was, as by a process that was killed."""
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)
        try:
            return self._file.recv()
        except (EOFError, OSError) as error:
            raise queue.Empty from error


def provide_writer_results() -> None:
    """Where a checkpoint's writer, a fork, leaves its list of what it wrote. Megatron asks a server
    process for that, on a GPU as well, which takes seconds to start and 350 MB on every rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_jam.parallel.versions import WRITER_RESULTS

    setattr(filesystem_async, WRITER_RESULTS, WriterResults)


def provide_adam(device: torch.device) -> None:
    """Without apex or Transformer Engine Megatron takes torch's Adam, whose state it cannot load,
    on a GPU as well; give it ours. On a CPU always: theirs run on GPUs alone. Also where apex was
    built without its kernels, which its Adam would miss as soon as it is made."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_jam.parallel.adam import Adam
    from megatron_jam.parallel.fused import find_apex_adam

    is_fused = not optimizer.USING_PYTORCH_OPTIMIZER
    if is_fused and optimizer.Adam.__module__.startswith("apex."):
        is_fused = not find_apex_adam().missing
    if device.type == "cuda" and is_fused:
        return
    optimizer.Adam = distrib_optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
