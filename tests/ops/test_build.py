"""What setup.py builds: the kernels of the CPU alone, or CUDA's too, as asked and as possible."""

import os
import runpy
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Extension
from torch.utils import cpp_extension

from tests.helpers.kernels import CSRC, ROOT


def extension(monkeypatch: pytest.MonkeyPatch, asked: str) -> Extension:
    """What setup.py hands to setuptools."""
    given: dict = {}
    monkeypatch.setenv("MEGATRON_JAM_CUDA", asked)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return given["ext_modules"][0]


def sources(*folders: str) -> set[str]:
    found = (path for folder in folders for path in (CSRC / folder).glob("*.c*"))
    return {str(path.relative_to(ROOT)) for path in found if path.suffix in (".cpp", ".cu")}


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch with CUDA and a folder with a compiler for it, as far as setup.py looks."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    os.chmod(nvcc, 0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("asked", ["0", "auto"])
def test_without_cuda_the_cpu_alone_is_built(monkeypatch, asked) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    built = extension(monkeypatch, asked)
    assert set(built.sources) == sources(".", "cpu")
    assert "-DMEGATRON_JAM_CUDA" not in built.extra_compile_args["cxx"]


@pytest.mark.parametrize("asked", ["1", "auto"])
def test_with_nvcc_and_a_cuda_torch_both_are_built(monkeypatch, toolkit, asked) -> None:
    built = extension(monkeypatch, asked)
    assert set(built.sources) == sources(".", "cpu", "cuda")
    assert "-DMEGATRON_JAM_CUDA" in built.extra_compile_args["cxx"]


def test_cuda_is_left_out_where_that_is_asked(monkeypatch, toolkit) -> None:
    assert set(extension(monkeypatch, "0").sources) == sources(".", "cpu")


def test_a_build_without_cuda_says_so_when_asked_for_it(monkeypatch, toolkit) -> None:
    (toolkit / "bin" / "nvcc").unlink()
    with pytest.raises(SystemExit, match="cannot be built: nvcc was not found"):
        extension(monkeypatch, "1")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match=r"cannot be built: torch .* is a build without CUDA"):
        extension(monkeypatch, "1")
    with pytest.raises(SystemExit, match="MEGATRON_JAM_CUDA is 'yes': use 1, 0 or auto"):
        extension(monkeypatch, "yes")
