"""The layout that a user is shown: exact counts, one row a stage, and mistakes in one line."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from megatron_jam.config.cli import run_command
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.planning.memory import plan
from tests.helpers.commands import ROOT, fails, tool
from tests.helpers.pico import pico_config
from tools.show_layout import main, size, spans

TOWER = str(ROOT / "examples/configs/models/tower.yaml")
LAYOUT = ("--parallel.tensor", "8", "--parallel.pipeline", "4", "--parallel.balance", "cost")


def test_table_has_a_row_for_each_stage() -> None:
    """As a process of its own."""
    settings = (*LAYOUT, "--replicas", "2", "--precision", "bf16")
    done = tool("show_layout", TOWER, *settings, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "6,729,801,728 parameters, 43.5 GFLOPs a token in training (46.72 with whole score"
        " matrices)"
    )
    assert lines[1] == "64 rank(s): TP 8 x PP 4 x CP 1 x DP 2"
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if re.match(r"\s*[0-3]  ", line)]
    assert [row[:3] for row in rows] == [
        ["0", "0-8", "0"],
        ["1", "9-16", "0"],
        ["2", "17-24", "0"],
        ["3", "25-31", "0"],
    ]
    # 8 layers of 12 d^2 on 8 ranks, in bf16: weights, fp32 gradients, 12 bytes on 2 replicas.
    weights = 8 * 12 * 4096**2 // 8
    due = [size(weights * each) for each in (2, 4, 6)]
    assert rows[1][3] == f"{8 * weights:,}"
    assert rows[1][6:9] == due == ["403 MB", "805 MB", "1.21 GB"]


def test_json_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a weights folder's config.json, whose folder may be named as well."""
    config = pico_config("cross", num_layers=5)
    config.save(tmp_path / "config.json")
    layout = ("--parallel.pipeline", "2", "--context_length", "32", "--global_batch_size", "6")
    settings = (*layout, "--micro_batch_size", "2", "--recompute", "full", "--json")
    run_command(main, [str(tmp_path), *settings])
    text = capsys.readouterr().out
    run_command(main, [f"{tmp_path}/config.json", *settings])
    assert capsys.readouterr().out == text
    shown = json.loads(text)
    stages = plan(
        config,
        ParallelConfig(pipeline=2),
        replicas=1,
        micro_batch_size=2,
        num_micro_batches=3,
        context_length=32,
        precision="fp32",
    )
    assert sum(stage["parameters"] for stage in shown["stages"]) == shown["parameters"]
    assert sum(stage["flops_share"] for stage in shown["stages"]) == pytest.approx(1)
    for row, stage in zip(shown["stages"], stages, strict=True):
        assert row["layers"] == stage.layers
        assert row["activations"] == stage.activations
        assert row["total"] == stage.state.total + stage.activations["full"]


def test_zero_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the 19.6B on one node: all shared out, the optimizer on the host."""
    model = str(ROOT / "examples/configs/models/cross_every2.yaml")
    settings = ("--precision=bf16", "--replicas=8", "--engine=deepspeed", "--deepspeed.stage=3")
    run_command(main, [model, *settings, "--deepspeed.offload_optimizer=true", "--json"])
    shown = json.loads(capsys.readouterr().out)
    (row,) = shown["stages"]
    share = shown["parameters"] / 8
    assert [row["weights"], row["host"]] == pytest.approx([2 * share, 20 * share], rel=1e-6)
    assert [row["gradients"], row["optimizer"]] == [0, 0]
    run_command(main, [model, *settings, "--deepspeed.offload_optimizer=true"])
    assert (
        "\non the host: gradients and optimizer, 49.1 GB of each rank\n" in capsys.readouterr().out
    )
    run_command(main, [model, *settings])
    told = capsys.readouterr().out
    assert "on the host: gradients" not in told
    assert "8 rank(s): TP 1 x PP 1 x CP 1 x DP 8, ZeRO-3\n" in told
    assert "29.5 GB" in told, "12 bytes of each weight, on 8 ranks"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no such file or folder: nowhere.yaml"),
        (
            ["examples/quickstart/configs/tower.yaml"],
            "examples/quickstart/configs/tower.yaml has no vocab_size: add --vocab_size, .*",
        ),
        (["examples/quickstart/configs/image.yaml"], "describes no model: it has no `towers`"),
        ([TOWER, "--parallel.tensor", "3"], "parallel.tensor 3 does not divide num_heads 32"),
        ([TOWER, "--parallel.pipeline", "64"], "needs at least 64 layers; the model has 32"),
        ([TOWER, "--parallel.balance", "even"], "parallel.balance.*even"),
        ([TOWER, "--context_length", "5000"], "context_length is 5000; max_positions is 4096"),
        ([TOWER, "--parallel.sequence", "true"], "parallel.sequence needs parallel.tensor"),
        ([TOWER, "--freeze", "[text]"], "freeze is .*text.*; it may hold towers image and text"),
        (
            [TOWER, "--parallel.pipeline=4", "--parallel.interleave=2", "--global_batch_size=6"],
            "the 6 micro-batches of a step must be a multiple of parallel.pipeline 4",
        ),
        (
            [TOWER, "--engine=deepspeed", "--parallel.tensor=2"],
            "engine deepspeed is data parallel alone, and parallel.tensor is 2: set it to 1",
        ),
        ([TOWER, "--replicas", "0"], "replicas is 0; it must be at least 1"),
        (
            [TOWER, "--replicas", "2", "--global_batch_size", "3"],
            "global_batch_size 3 is not a multiple of micro_batch_size 1 x 2 replicas",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        run_command(main, arguments)
    out, told = capsys.readouterr()
    fails(subprocess.CompletedProcess(arguments, left.value.code, out, told), message)


def test_numbers_are_short() -> None:
    assert spans([0, 1, 2, 7, 9, 10]) == "0-2,7,9-10"
    sizes = [size(n) for n in (0, 999, 1000, 999_600, 12_345_678, 2.5e15)]
    assert sizes == ["0 B", "999 B", "1 kB", "1 MB", "12.3 MB", "2.5 PB"]
