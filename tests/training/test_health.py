"""Steps that are skipped: numbers that are not finite, spikes, steps that are left out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.health import HealthConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World
from megatron_jam.training.checkpoint import complete_checkpoints
from megatron_jam.training.health import LEFT_OUT, Health, Unhealthy
from megatron_jam.training.loop import Training
from megatron_jam.training.manifest import read_manifest
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pool import WorkerPool
from tests.helpers.training import LAYOUTS, build_training, run_training, settings, tensors


def spoil_loss(training: Training, step: int) -> None:
    """The loss of one token of this rank's first sample in `step` is not a number; gradients are
    as they were."""
    plain, calls = training.engine.forward._loss, []
    micro_batches = training.config.num_micro_batches(training.world.size)

    def loss(batch: Any, output: Any) -> Any:
        calls.append(None)
        if len(calls) == (step - 1) * micro_batches + 1:
            output[1].view(-1)[batch["loss_mask"].view(-1).argmax()] = math.nan
        return plain(batch, output)

    training.engine.forward._loss = loss  # type: ignore[method-assign]


def spoil_gradient(training: Training, step: int) -> None:
    """One element of this rank's gradients in `step` is infinite; the losses are as they were."""
    plain, calls = training.engine.optimizer.prepare_grads, []

    def prepare() -> bool:
        calls.append(None)
        if len(calls) == step:
            parameters = (p for p in training.chunks[0].parameters() if p.requires_grad)
            next(parameters).main_grad.view(-1)[0] = math.inf
        return plain()

    training.engine.optimizer.prepare_grads = prepare  # type: ignore[method-assign]


SPOIL = {"loss": spoil_loss, "gradient": spoil_gradient}


def spoilt_run(world: World, values: dict[str, Any], kind: str, steps: list[int]) -> str:
    """A run in which the last rank's numbers are spoilt in `steps`; how it ended."""
    training = build_training(world, values)
    if world.rank == world.size - 1:
        for step in steps:
            SPOIL[kind](training, step)
    try:
        training.run()
    except Unhealthy as reason:
        return str(reason)
    return f"{training.health.skipped} skipped"


@pytest.mark.parametrize(
    ("layout", "kind"), [("one", "loss"), ("dp2", "loss"), ("dp2", "gradient"), ("pp2", "gradient")]
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    layout: str, kind: str, material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """The rest of the run is that of one which leaves the step out; its samples are named."""
    parallel, data = LAYOUTS[layout]
    left_out = settings(material, tmp_path / "left_out", parallel)
    left_out["health"] = HealthConfig(skip_steps=[2])
    pool.run(run_training, parallel, left_out, data=data)
    values = settings(material, tmp_path / "spoilt", parallel)
    ends = pool.run(spoilt_run, parallel, values, kind, [2], data=data)
    assert set(ends) == {"1 skipped"}
    one, other = tensors(tmp_path / "left_out"), tensors(tmp_path / "spoilt")
    assert all(torch.equal(one[name], other[name]) for name in one)
    (line,) = (tmp_path / "spoilt/skipped.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 2
    # Of a loss the sample is known: the last rank's first one.
    suspects = {"loss": [[2 + data - 1]], "gradient": [[2], [3]]}[kind]
    assert entry["samples"] == [["set", *each] for each in suspects]
    (path,) = complete_checkpoints(tmp_path / "spoilt/checkpoints")
    assert read_manifest(path)["counters"]["health"]["skipped"] == 1
    told = train_line(tmp_path / "spoilt", 2)
    assert told["loss" if kind == "loss" else "grad_norm"] is None
    assert told["skipped"].startswith("the ")
    told = train_line(tmp_path / "left_out", 2)
    assert (told["loss"], told["grad_norm"], told["skipped"]) == (None, None, LEFT_OUT)


def train_line(output: Path, step: int) -> dict[str, Any]:
    """What a run said of a step, in JSON that any program reads."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (output / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    (found,) = (x for x in lines if (x["kind"], x["step"]) == ("train", step))
    return found


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_the_state_before(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    parallel, data = LAYOUTS["dp2"]
    values = settings(material, tmp_path / "run", parallel, checkpoint_every=1)
    values["health"] = HealthConfig(max_skipped=1)
    ends = pool.run(spoilt_run, parallel, values, "loss", [2, 3], data=data)
    assert set(ends) <= {
        f"2 steps in a row were skipped, the last as {why}"
        for why in ("the loss is nan", "the loss of another rank is not finite")
    }
    (path,) = complete_checkpoints(tmp_path / "run/checkpoints")
    assert path.name == "step-00000001"
    health = read_manifest(path)["counters"]["health"]
    assert (health["skipped"], health["skipped_in_a_row"], len(health["losses"])) == (0, 0, 1)
    assert not (tmp_path / "run/weights").exists()
    # What was spoilt is no more: the run goes on from there.
    whole = settings(material, tmp_path / "whole", parallel)
    pool.run(run_training, parallel, values, data=data)
    pool.run(run_training, parallel, whole, data=data)
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


LOSSES = [4.0, 4.1, 3.9, 4.0, 4.05, 3.95, 4.0, 4.1, 3.9]


def fed(**values: Any) -> Health:
    """Health that has seen ordinary losses: median 4, limit 4 + 8 x 1.4826 x 0.05 = 4.593."""
    health = Health(HealthConfig(**values))
    assert [health.judge(loss, 1.0) for loss in LOSSES] == [""] * len(LOSSES)
    return health


def test_a_spike_is_told_of_skipped_or_stops_the_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="megatron_jam")
    health = fed()
    assert health.judge(4.55, 1.0) == ""
    assert not caplog.records
    assert health.judge(5.5, 1.0) == ""
    assert "the loss 5.5000 is a spike" in caplog.text
    skips = fed(on_spike="skip")
    expected = "the last 9 have the median 4.0000, the limit is 4.5930"
    assert skips.judge(4.7, 1.0) == f"the loss 4.7000 is a spike: {expected}"
    assert skips.judge(4.7, 1.0).endswith(expected), "a skipped step is not usual"
    with pytest.raises(Unhealthy, match=r"4\.7000 is a spike"):
        fed(on_spike="stop").judge(4.7, 1.0)
    assert fed(spike_window=0, on_spike="skip").judge(400.0, 1.0) == ""


def test_a_flat_loss_has_a_least_deviation() -> None:
    health = Health(HealthConfig(on_spike="skip"))
    for _ in range(20):
        health.judge(2.0, 1.0)
    assert health.judge(2.15, 1.0) == ""
    assert "the limit is 2.1600" in health.judge(2.17, 1.0)


def test_health_goes_on_where_it_was() -> None:
    health = fed(on_spike="skip", max_skipped=1)
    health.count("the loss is nan")
    health.count(LEFT_OUT)
    again = Health(HealthConfig(on_spike="skip", max_skipped=1))
    again.restore(json.loads(json.dumps(health.state())))
    assert again.state() == health.state()
    assert not again.is_hopeless
    again.count("the loss is nan")
    assert again.is_hopeless
    assert again.state_before()["skipped"] == 0
    again.count("")
    assert (again.skipped, again.skipped_in_a_row) == (2, 0)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_is_skipped_from_the_first_step(loss: float, norm: float) -> None:
    assert Health(HealthConfig()).judge(loss, norm).endswith(("is nan", "is inf"))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UsageError, match=r"health\.max_skipped is -1"):
        HealthConfig(max_skipped=-1)
    with pytest.raises(UsageError, match=r"steps are counted from 1"):
        HealthConfig(skip_steps=[0])


def test_a_run_leaves_its_listed_steps_out(
    material: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """A run of which all steps are left out ends as it began."""
    values = settings(material, tmp_path / "run", ParallelConfig())
    values["health"] = HealthConfig(skip_steps=[1, 2, 3, 4], max_skipped=0)
    pool.run(run_training, ParallelConfig(), values)
    before, after = WeightsFolder(material[0]), tensors(tmp_path / "run")
    assert all(torch.equal(before.read(name), value) for name, value in after.items())
