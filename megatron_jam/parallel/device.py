"""Which device a process computes on."""

import os
import platform
from pathlib import Path

import torch

from megatron_jam.config.errors import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Parameters and activations of each precision that a setting can name."""


def select_device() -> torch.device:
    """Return this process's CUDA device where there is one, else the CPU.

    On the CPU a process gets one thread unless OMP_NUM_THREADS says otherwise.

    Raises:
        UsageError: if this host has GPUs, but fewer than ranks.
    """
    if torch.cuda.is_available():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        gpus = torch.cuda.device_count()
        if ranks > gpus:
            raise UsageError(
                f"{ranks} ranks on a host with {gpus} GPUs: start as many ranks as GPUs, or set"
                " CUDA_VISIBLE_DEVICES= to compute on the CPU"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """Name of the torch.distributed backend for `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str:
    """What the device is: a GPU's name, or a CPU's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until all that was started on `device` is done, so that the time is known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory that this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_memory_bytes(device: torch.device) -> int:
    """Memory that this process holds now: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_memory_bytes(device: torch.device) -> int:
    """Memory that this process may use: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
