"""The kernels of csrc as tests force them: each set of instructions, and CUDA's on the CPU."""

import contextlib
import ctypes
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megatron_jam.config.files import publish, temporary_name
from megatron_jam.ops import extension  # noqa: F401  (loads it)

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
INCLUDES = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
EMULATION = [f"-I{CSRC / 'emulation'}", *INCLUDES]
CORE = [CSRC / "cpu" / f"{name}.cpp" for name in ("backend", "portable", "avx2", "avx512")]

BACKENDS = ["avx512", "avx2", "portable", "emulated"]


def compiled(name: str, sources: list[Path], *flags: str) -> Path:
    """What g++ makes of `sources`, made again only when a file of csrc or a flag has changed."""
    command = ["g++", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", *flags]
    command += [str(source) for source in sources]
    state = hashlib.sha256(" ".join(command).encode())
    for path in sorted({*sources, *(each for each in CSRC.rglob("*") if each.is_file())}):
        state.update(path.read_bytes())
    target = ROOT / "build" / "tests" / f"{name}-{state.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(target)
        result = subprocess.run(
            [*command, "-o", str(temporary)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[-4000:]
        publish(temporary, target)
    return target


@cache
def emulation() -> ctypes.CDLL:
    """CUDA's kernels, compiled for this CPU."""
    tuned = ["-mfma"] if platform.machine() == "x86_64" else []
    sources = [CSRC / "emulation" / f"{name}.cpp" for name in ("emulation", "guided_sampling")]
    library = ctypes.CDLL(
        str(compiled("emulation.so", sources, "-O2", *tuned, "-shared", "-fPIC", *EMULATION))
    )
    library.jam_emulated_backend.restype = ctypes.c_void_p
    library.jam_emulate_with.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_uint64]
    return library


@cache
def _extension() -> ctypes.CDLL:
    library = ctypes.CDLL(sys.modules["megatron_jam._C"].__file__)
    library.jam_backend.restype = ctypes.c_void_p
    library.jam_set_backend.argtypes = [ctypes.c_void_p]
    return library


def has_backend(name: str) -> bool:
    """Whether this CPU has the instructions."""
    return name == "emulated" or _extension().jam_backend(name.encode()) is not None


@contextlib.contextmanager
def using(
    name: str, *, threads: int = 64, memory_limit: int = 227 << 10, seed: int = 0
) -> Iterator[None]:
    """CPU tensors are served by backend `name`; the rest says how CUDA's kernels are emulated.

    Args:
        threads: of a block.
        memory_limit: bytes of shared memory that a block may have.
        seed: of the order in which threads run.
    """
    if name == "emulated":
        emulation().jam_emulate_with(threads, memory_limit, seed)
        backend = emulation().jam_emulated_backend()
    else:
        backend = _extension().jam_backend(name.encode())
    _extension().jam_set_backend(backend)
    try:
        yield
    finally:
        _extension().jam_set_backend(None)
