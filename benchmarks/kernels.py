"""What nvcc makes of csrc's CUDA kernels: registers, shared memory and spills.

python -m benchmarks.kernels prints the tables of docs/kernels.md. No GPU is needed.
"""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = ["sm_80", "sm_90"]
TYPES = {"If": "float32", "INS_8BFloat16": "bfloat16", "INS_7Float16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel as ptxas reports it."""

    name: str
    registers: int
    """Of a thread."""
    shared_bytes: int
    """Static ones of a block; a launch adds its own."""
    stack_bytes: int
    spilled_bytes: int
    """Stores and loads of registers that did not fit."""


def compile_kernels(source: Path, architecture: str) -> list[Kernel]:
    """Compile a .cu file of csrc; every warning is an error.

    Raises:
        RuntimeError: nvcc refuses; with what it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(NVCC),
            "-cubin",
            "-std=c++20",
            "-O3",
            "--fmad=false",
            f"-arch={architecture}",
        ]
        command += ["-Xptxas", "-v", "-Werror", "all-warnings", f"-I{CSRC}", f"-I{CSRC}/include"]
        command += [str(source), "-o", f"{folder}/kernels.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return sorted(_kernels(result.stderr), key=lambda kernel: kernel.name)


def _kernels(report: str) -> list[Kernel]:
    found = []
    for part in report.split("Function properties for ")[1:]:
        stack, stores, loads = _numbers(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Kernel(
                name=_name(part.split()[0]),
                registers=_numbers(r"Used (\d+) registers", part)[0],
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=stack,
                spilled_bytes=stores + loads,
            )
        )
    return found


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    assert match, f"nvcc's report has no {pattern!r}"
    return [int(each) for each in match.groups()]


def _name(mangled: str) -> str:
    name = re.search(r"\d([a-z_]+_kernel)", mangled)
    assert name, f"{mangled} is no kernel"
    return f"{name[1]}, {next(TYPES[each] for each in TYPES if f'kernel{each}' in mangled)}"


def main() -> None:
    """Print a table for each source."""
    assert NVCC, "nvcc is not installed"
    for source in sorted(CSRC.glob("cuda/*.cu")):
        columns = {each: compile_kernels(source, each) for each in ARCHITECTURES}
        print(f"`csrc/cuda/{source.name}`: registers of a thread / static shared memory / spills\n")
        print(f"| kernel | {' | '.join(ARCHITECTURES)} |\n|---|{'---|' * len(ARCHITECTURES)}")
        for row in zip(*columns.values(), strict=True):
            cells = [f"{k.registers} / {k.shared_bytes} B / {k.spilled_bytes} B" for k in row]
            print(f"| {row[0].name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
