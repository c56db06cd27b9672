"""What a node says of itself before a run (examples/slurm/check_node.py)."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

Check = Callable[..., str]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the check of node n1 and returns its line."""
    main = runpy.run_path(str(ROOT / "examples/slurm/check_node.py"))["main"]

    def run(head: str = "127.0.0.1", output: Path = tmp_path, **settings: object) -> str:
        main("n1", head, output, **{"device": "cpu", "min_free_gb": 0, **settings})
        (line,) = capsys.readouterr().out.splitlines()
        return line

    return run


def test_a_well_node_says_what_it_has(check: Check, tmp_path: Path) -> None:
    line = check()
    assert line.startswith("n1 ok megatron-jam ")
    assert all(f", {name} " in line for name in ("torch", "megatron-core", "numpy"))
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_named(check: Check, tmp_path: Path) -> None:
    assert "does not know the first host nowhere.invalid" in check(head="nowhere.invalid")
    assert f"{tmp_path} has " in check(min_free_gb=1e9)
    line = check(head="nowhere.invalid", output=tmp_path / "gone")
    assert line.startswith("n1 bad: does not know the first host nowhere.invalid (")
    assert f"; cannot write to {tmp_path / 'gone'} (No such file or directory)" in line


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["0, H100, 570.1, 4, 0", "1, H100, 570.1, 4, [N/A]"], "torch finds 0 GPUs, 2 are wanted"),
        (["0, H100, 570.1, 4, 0"], "1 GPUs, 2 are wanted"),
        (
            ["0, H100, 570.1, 4, 2", "1, H100, 570.1, 70123, 0"],
            "GPU 0 has 2 uncorrected memory errors; GPU 1 has 70123 MiB in use by another program",
        ),
    ],
)
def test_faults_of_gpus(
    said: list[str],
    expected: str,
    check: Check,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the driver's tool tells them; torch finds none here, so that no node with GPUs is well."""
    lines = "\n".join(said)
    give_nvidia_smi(tmp_path / "bin", f"cat <<'END'\n{lines}\nEND", monkeypatch)
    assert check(device="cuda", ranks=2) == f"n1 bad: {expected}"


def test_a_broken_driver(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_nvidia_smi(tmp_path / "bin", "echo Driver/library version mismatch; exit 18", monkeypatch)
    expected = "n1 bad: nvidia-smi fails: Driver/library version mismatch"
    assert check(device="cuda", ranks=2) == expected
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check(device="cuda", ranks=2) == "n1 bad: nvidia-smi fails (FileNotFoundError)"


def give_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
