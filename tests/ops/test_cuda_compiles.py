"""The CUDA sources compile where there is nvcc, whether or not torch has CUDA or a GPU is there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
INCLUDES = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cu")), ids=lambda path: path.name)
def test_kernels_compile_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    command = [NVCC, "-cubin", "-std=c++20", "-O3", "--fmad=false", f"-arch={architecture}"]
    command += ["-Xptxas", "-v", "-Werror", "all-warnings", *INCLUDES, str(source)]
    command += ["-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) == 3  # one kernel for each type of logits
    assert set(spills) == {("0", "0")}, result.stderr


@needs_nvcc
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cpp")), ids=lambda path: path.name)
def test_launchers_compile(source: Path, tmp_path: Path) -> None:
    # The define stands in for a header that only CUDA builds of torch ship.
    command = [NVCC, "-c", "-std=c++20", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *INCLUDES]
    command += ["-Xcompiler", "-fsyntax-only"]
    command += [f"-isystem={path}" for path in include_paths()]
    command += [str(source), "-o", str(tmp_path / "launcher.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
