"""A sweep times what works, says why the rest failed, and compares with an earlier one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.evaluation.sweep import as_table, possible_layouts
from megatron_jam.planning.flops import model_flops
from tests.helpers.commands import ROOT, environment
from tests.helpers.pico import pico_config


def row(name: str, speed: float, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "tokens_per_second_per_rank": speed,
        "tflops": 1.5,
        "tflops_full": 2.0,
        "mfu": 0.5,
        "peak_memory_bytes": 2_000_000_000,
        "seconds_per_step": 0.25,
        **changes,
    }


def test_table() -> None:
    rows = [row("slow", 100.0), row("fast", 2000.0, mfu=None), {"name": "bad", "failure": "why"}]
    head, *lines = as_table(rows, {"slow": row("slow", 50.0)}).splitlines()
    assert head.split()[0] == "layout"
    assert lines[0].split() == ["fast", "2,000", "1.5", "2", "n/a", "2.00", "250"]
    assert lines[1].split() == ["slow", "100", "1.5", "2", "50.0%", "2.00", "250", "2.00"]
    assert lines[2] == "bad: why"


def test_layouts_that_fit() -> None:
    """4 heads and 4 layers on 8 ranks: no TP 8, no PP 8."""
    found = {(p.tensor, p.pipeline) for p in possible_layouts(pico_config("cross"), 8)}
    assert found == {(t, p) for t in (1, 2, 4) for p in (1, 2, 4) if t * p <= 8}
    assert all(p.sequence == (p.tensor > 1) for p in possible_layouts(pico_config("cross"), 8))


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Under torchrun: one layout that works and one that does not."""
    model = pico_config("cross", num_layers=2)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(dataclasses.asdict(model)))
    layouts = [{"tensor": 2}, {"tensor": 2, "pipeline": 2}]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(ROOT / "tools" / "benchmark_throughput.py"), "model.yaml", "out.json"),
        *("--context_length", "16", "--global_batch_size", "2", "--steps", "2"),
        *("--precision", "fp32", "--recompute", "[none]", "--layouts", json.dumps(layouts)),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    worked, failed = result["rows"]
    assert worked["name"] == "tp2-pp1 mb1 none"
    assert worked["ranks"] == 2
    assert worked["mfu"] is None
    tokens = 2 * 16 / worked["seconds_per_step"] / 2
    assert worked["tokens_per_second_per_rank"] == pytest.approx(tokens)
    flops = model_flops(model, context_length=16).training
    assert worked["tflops"] == pytest.approx(tokens * flops / 1e12)
    assert "does not divide the 2 ranks" in failed["failure"]
    assert "tp2-pp2 mb1 none: UsageError: parallel.tensor 2 x" in done.stdout
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (990, 660)
    assert os.path.getsize(tmp_path / "out.png") > 5000


def test_parallel_config_is_read_back(tmp_path: Path) -> None:
    from megatron_jam.training.throughput import Trial

    trial = Trial(
        model={},
        parallel=ParallelConfig(tensor=2, sequence=True),
        micro_batch_size=1,
        recompute="full",
        context_length=16,
        global_batch_size=2,
        precision="bf16",
    )
    trial.save(tmp_path / "trial.json")
    assert Trial.load(tmp_path / "trial.json") == trial
    assert trial.name == "tp2-sp-pp1 mb1 full"
