"""The C++ core without torch: every backend agrees, under sanitizers and valgrind."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.kernels import CORE, CSRC, EMULATION, INCLUDES, ROOT, compiled

MAIN = ROOT / "tests" / "ops" / "emulated" / "core.cpp"
SANITIZED = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATED = [CSRC / "emulation" / f"{name}.cpp" for name in ("emulation", "guided_sampling")]


def run(program: Path, calls: int, *prefix: str) -> None:
    # Fake stacks, which ASan makes to see uses after return, do not go with fibers.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    command = [*prefix, str(program), str(calls)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert f"{calls} calls agree" in result.stdout


@pytest.mark.slow
def test_backends_agree_under_sanitizers() -> None:
    """ASan and UBSan find nothing, CUDA's kernels on the CPU included."""
    tuned = ["-mfma"] if platform.machine() == "x86_64" else []
    flags = [*SANITIZED, *tuned, "-DWITH_EMULATION", "-DJAM_EMULATION_UCONTEXT", *EMULATION]
    run(compiled("core-sanitized", [MAIN, *CORE, *EMULATED], *flags), 500)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_backends_agree_under_valgrind() -> None:
    """It finds no use of memory that was not written or is not ours, and no leak."""
    program = compiled("core-valgrind", [MAIN, *CORE], "-O1", "-g", *INCLUDES)
    run(program, 300, "valgrind", "--error-exitcode=9", "--leak-check=full", "--quiet")
