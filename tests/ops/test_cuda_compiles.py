"""The CUDA sources compile where there is nvcc, whether or not torch has CUDA or a GPU is there."""

import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from benchmarks.kernels import ARCHITECTURES, NVCC, compile_kernels
from tests.helpers.kernels import CSRC, INCLUDES, ROOT

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cu")), ids=lambda path: path.name)
def test_kernels_compile_without_spills(source: Path, architecture: str) -> None:
    kernels = compile_kernels(source, architecture)
    assert len(kernels) == 12  # four, for each type of logits
    report = (ROOT / "docs" / "kernels.md").read_text()
    for kernel in kernels:
        assert (kernel.stack_bytes, kernel.spilled_bytes) == (0, 0), kernel
        assert f"| {kernel.name} |" in report


@needs_nvcc
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cpp")), ids=lambda path: path.name)
def test_launchers_compile(source: Path, tmp_path: Path) -> None:
    # The define stands in for a header that only CUDA builds of torch ship.
    command = [str(NVCC), "-c", "-std=c++20", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *INCLUDES]
    command += ["-Xcompiler", "-fsyntax-only"]
    command += [f"-isystem={path}" for path in include_paths()]
    command += [str(source), "-o", str(tmp_path / "launcher.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
