"""Which optional fused kernels this process finds, and which of them it uses."""

import importlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from megatron_jam.parallel.device import device_name


@dataclass(frozen=True, kw_only=True)
class Found:
    """A package that may be there."""

    version: str = ""
    """Its version, or "built" where it has none."""

    missing: str = ""
    """Why it cannot be used; empty if it can."""

    def __str__(self) -> str:
        return self.missing or self.version


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of training for which there is a fused kernel."""

    name: str
    """What it does."""

    uses: str
    """What does it in this run."""

    found: str
    """What was found of the fused kernels, or why they are missing."""


def find_transformer_engine() -> Found:
    """NVIDIA's Transformer Engine, for layers and Adam."""
    try:
        package = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # built for another torch or CUDA it fails in many ways
        return Found(missing=_reason("Transformer Engine", error))
    return Found(version=f"Transformer Engine {getattr(package, '__version__', 'built')}")


def find_apex_adam() -> Found:
    """NVIDIA apex's FusedAdam with the CUDA kernels it needs."""
    try:
        package = importlib.import_module("apex")
    except Exception as error:
        return Found(missing=_reason("apex", error))
    try:
        optimizers = importlib.import_module("apex.optimizers")
        assert hasattr(optimizers, "FusedAdam")
    except Exception:
        return Found(missing="the apex that is installed is not NVIDIA's")
    try:
        importlib.import_module("amp_C")
    except Exception as error:
        return Found(missing=_reason("apex's CUDA kernel amp_C", error))
    return Found(version=f"apex {getattr(package, '__version__', 'built')}")


def find_apex_gradients() -> Found:
    """NVIDIA apex's kernel that adds a weight's gradient to its fp32 sum within the product."""
    name = "fused_weight_gradient_mlp_cuda"
    try:
        importlib.import_module(name)
    except Exception as error:
        return Found(missing=_reason(f"apex's CUDA kernel {name}", error))
    return Found(version="apex's kernel")


def find_cuda_kernels() -> Found:
    """The CUDA half of megatron_jam._C."""
    try:
        importlib.import_module("megatron_jam.ops.extension")
    except ImportError as error:
        return Found(missing=_reason("megatron_jam._C", error))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel("megatron_jam::guided_sample", "CUDA"):
        return Found(missing="megatron_jam._C was built without CUDA")
    return Found(version="built")


def fuses_weight_gradients(device: torch.device) -> bool:
    """Whether linear layers on `device` can add to a weight's gradient within the product."""
    return device.type == "cpu" or not find_apex_gradients().missing


def fused_parts(device: torch.device, backend: str, engine: str = "megatron") -> list[Part]:
    """Each part, what it uses on `device` with layers of `backend`, and what was found."""
    from megatron.core import optimizer

    transformer_engine, kernels = find_transformer_engine(), find_cuda_kernels()
    compiles = device.type == "cuda" and not kernels.missing
    is_megatron = engine == "megatron"
    adam = optimizer.Adam if is_megatron else torch.optim.AdamW
    fuses = is_megatron and fuses_weight_gradients(device)
    return [
        Part(name="layers", uses=backend, found=str(transformer_engine)),
        Part(
            name="Adam",
            uses=f"{adam.__module__}.{adam.__name__}",
            found=f"{transformer_engine}; {find_apex_adam()}",
        ),
        Part(
            name="weight gradients",
            uses="added within the product" if fuses else "added apart",
            found=str(find_apex_gradients()),
        ),
        Part(name="csrc", uses="CUDA kernels" if compiles else "CPU kernels", found=str(kernels)),
    ]


def describe_parts(parts: Sequence[Part]) -> str:
    """One line for the log."""
    return " | ".join(f"{part.name}: {part.uses} (found: {part.found})" for part in parts)


def environment(device: torch.device, backend: str, engine: str = "megatron") -> dict[str, Any]:
    """What a run computes with, as plain JSON values."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "megatron_core": version("megatron-core"),
        "device": device_name(device),
        "parts": [asdict(part) for part in fused_parts(device, backend, engine)],
    }


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"no {name}"
    text = str(error).splitlines()
    return f"{name} cannot be imported: {type(error).__name__}{': ' + text[0] if text else ''}"
