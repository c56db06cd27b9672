"""What a run says, in its log, its JSON lines, TensorBoard, Weights & Biases and on a terminal."""

import io
import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_jam.config.data import Cm3Config, DataConfig, DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig, RunConfig
from megatron_jam.parallel.world import World
from megatron_jam.planning.flops import model_flops
from megatron_jam.training.losses import Losses
from megatron_jam.training.metrics import (
    AVERAGE,
    Reporter,
    describe_step,
    duration,
    read_metrics,
    warn_of_warmup,
)
from megatron_jam.training.sinks import JsonLines, ProgressLine, WeightsAndBiases, scalars
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pool import WorkerPool
from tests.helpers.training import HALF, STEPS, run_training, settings

PARALLEL = ParallelConfig(pipeline=2)
PARTS = {"image", "text", "bridges", "embeddings", "head"}


def two_sets(material: tuple[Path, Path], output: Path) -> dict[str, Any]:
    prefix = material[1]
    sets = [
        DataSetConfig(name="one", path=str(prefix), weight=3),
        DataSetConfig(name="other", path=str(prefix), weight=1),
    ]
    held_out = [DataSetConfig(name=n, path=str(prefix.with_name("held_out"))) for n in "ab"]
    return settings(
        material,
        output,
        PARALLEL,
        data=DataConfig(sets=sets, objective="cm3", cm3=Cm3Config(mean_spans=2.0)),
        validation=held_out,
        validate_every=HALF,
        global_batch_size=8,
    )


@pytest.fixture(scope="module")
def run(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was stopped at half of its steps, spoke on a little, and was resumed."""
    output = tmp_path_factory.mktemp("metrics") / "run"
    values = two_sets(material, output)
    pool.run(run_training, PARALLEL, {**values, "stop_at": HALF}, data=1)
    pool.run(run_training, PARALLEL, values)
    return output


def train_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


def test_a_line_has_everything(run: Path) -> None:
    lines = train_lines(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert set(line["grad_norm_by_part"]) == PARTS
        whole = math.sqrt(sum(v**2 for v in line["grad_norm_by_part"].values()))
        assert whole == pytest.approx(line["grad_norm"], rel=1e-5)
        assert set(line["seconds"]) == {
            *("data", "forward_backward", "reduction", "optimizer", "other")
        }
        assert sum(line["seconds"].values()) == pytest.approx(line["seconds_per_step"], rel=1e-3)
        assert all(value >= 0 for value in line["seconds"].values())
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["seconds_per_step"])
        assert line["tokens_per_second_per_rank"] == line["tokens_per_second"] / 2
        assert line["mfu"] is None, "no peak is known of a CPU"
        assert line["peak_memory_bytes"] > 1e7


def test_losses_by_kind_and_set_make_the_whole(run: Path) -> None:
    kinds = set()
    for line in train_lines(run):
        counts = line["tokens_by_modality"]
        kinds |= set(counts)
        total = sum(counts[k] * line["loss_by_modality"][k] for k in counts)
        assert total / sum(counts.values()) == pytest.approx(line["loss"])
    assert kinds == {"text", "special", "infill"}


def test_losses_by_set_are_of_its_samples(run: Path, material: tuple[Path, Path]) -> None:
    """Of 8 samples 6 are the first set's; the sets' losses lie around the whole."""
    for line in train_lines(run):
        one, other = line["loss_by_set"]["one"], line["loss_by_set"]["other"]
        share = (line["loss"] - other) / (one - other)
        assert 0.5 < share < 0.95


def test_speed_is_by_the_formula(run: Path, material: tuple[Path, Path]) -> None:
    model = WeightsFolder(material[0]).config
    line = train_lines(run)[-1]
    for attention, name in (("causal", "tflops"), ("full", "tflops_full")):
        flops = model_flops(model, context_length=32, attention=attention).training
        due = line["tokens_per_second_per_rank"] * flops / 1e12
        assert line[name] == pytest.approx(due)


def test_validation_has_an_average(run: Path) -> None:
    lines = [x for x in read_metrics(run / "metrics.jsonl") if x["kind"] == "validation"]
    assert [(x["step"], x["set"]) for x in lines] == [
        (step, name) for step in (HALF, STEPS) for name in ("a", "b", AVERAGE)
    ]
    one, other, average = lines[-3:]
    assert average["loss"] == pytest.approx((one["loss"] + other["loss"]) / 2)
    assert average["perplexity"]["all"] == pytest.approx(math.exp(average["loss"]))


def test_a_validation_that_is_no_number_has_none_in_json(
    material: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss over text that is not finite, over image tokens it is 2; of the whole, so, too."""
    reporter = Reporter(RunConfig(**two_sets(material, tmp_path)), writes=True)
    reporter._sinks = [JsonLines(tmp_path / "metrics.jsonl")]
    sums = torch.tensor([[math.nan, 2.0, 0.0, 0.0]], dtype=torch.float64)
    losses = Losses(sums=sums, counts=torch.tensor([[1.0, 1.0, 0.0, 0.0]]).double())
    with caplog.at_level(logging.INFO, logger=logger.name):
        reporter.validated(HALF, {"a": losses})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=pytest.fail)
    assert (line["set"], line["loss"], line["loss_by_modality"]) == ("a", None, {"image": 2.0})
    assert line["perplexity"] == {"image": pytest.approx(math.exp(2))}
    assert "validation a | loss n/a | perplexity image 7.39" in caplog.text


def test_tensorboard_has_the_same(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = train_lines(run)
    for tag, values in {
        "train/loss": [line["loss"] for line in lines],
        "train/grad_norm_by_part/bridges": [x["grad_norm_by_part"]["bridges"] for x in lines],
        "train/seconds/data": [line["seconds"]["data"] for line in lines],
    }.items():
        found = [(each.step, each.value) for each in events.Scalars(tag)]
        assert [step for step, _ in found] == list(range(1, STEPS + 1)), "a resumed run's twice"
        assert [value for _, value in found] == pytest.approx(values, rel=1e-6)
    assert len(events.Scalars(f"validation/{AVERAGE}/perplexity/all")) == 2


def test_log_line(run: Path) -> None:
    line = {**train_lines(run)[-1], "loss_by_set": {"one": 1.5, "other": 2.5}, "mfu": 0.4567}
    line |= {"seconds_left": 3725, "tflops": 123.4, "tflops_full": 150.0}
    told = describe_step(7, 20, line)
    for part in (
        "step 7/20 | loss ",
        "one 1.500, other 2.500",
        "infill ",
        "bridges ",
        "forward-backward ",
        "tokens/s, ",
        " a rank | 123 TFLOP/s a rank (150 full), MFU 45.7%",
        " GB | left 1:02:05",
    ):
        assert part in told
    assert "\n" not in told
    assert "MFU n/a" in describe_step(7, 20, {**line, "mfu": None})


@pytest.mark.parametrize(("warmup", "warns"), [(4, True), (300, True), (3, False)])
def test_a_warmup_as_long_as_the_run_is_named(
    caplog: pytest.LogCaptureFixture, material: tuple[Path, Path], warmup: int, warns: bool
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=warmup)
    values = settings(material, Path("run"), ParallelConfig(), optimizer=optimizer)
    logger.addHandler(caplog.handler)
    try:
        warn_of_warmup(RunConfig(**values))
    finally:
        logger.removeHandler(caplog.handler)
    assert ("the learning rate only rises" in caplog.text) == warns
    assert ("set optimizer.warmup_steps to 1," in caplog.text) == warns


def test_scalars() -> None:
    values = {"set": "a", "loss": 2, "by": {"x": 1.5}, "none": None}
    assert dict(scalars("validation", values)) == {"validation/a/loss": 2, "validation/a/by/x": 1.5}


def test_duration() -> None:
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_progress_line_stays_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    logger.addHandler(handler)
    try:
        progress = ProgressLine.on_terminal(4)
        assert progress is not None
        progress.show(1, 2.0)
        logger.warning("a line")
        progress.show(2, 1.5)
        progress.close()
        logger.warning("the end")
    finally:
        logger.removeHandler(handler)
    shown = terminal.getvalue().split("\r")
    assert shown[1] == "[######..................] step 1/4 | loss 2.0000\x1b[K"
    assert shown[2] == "\x1b[Ka line\n", "the line is wiped before a record"
    assert shown[3].startswith("[############............] step 2/4 | loss 1.5000 | left 0:00:0")
    assert shown[4] == "\x1b[Kthe end\n"


def test_no_progress_line_in_a_batch_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert ProgressLine.on_terminal(4) is None


def stand_in(told: list[Any]) -> types.ModuleType:
    """A module with the three calls of wandb that are used."""
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end")
    )

    def init(**settings: Any) -> Any:
        told.append(settings)
        return run

    module.init = init  # type: ignore[attr-defined]
    return module


def test_weights_and_biases(
    monkeypatch: pytest.MonkeyPatch, material: tuple[Path, Path], tmp_path: Path
) -> None:
    told: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", stand_in(told))
    values = settings(material, tmp_path / "run", ParallelConfig(), wandb="jam")
    sink = WeightsAndBiases(RunConfig(**values))
    sink.write(3, "train", {"loss": 1.5, "loss_by_set": {"a": 2.0}})
    sink.close()
    first, *rest = told
    assert (first["project"], first["resume"]) == ("jam", "allow")
    assert first["config"]["steps"] == STEPS
    assert rest == [(3, {"train/loss": 1.5, "train/loss_by_set/a": 2.0}), "end"]


def asks_for_wandb(world: World, values: dict[str, Any]) -> None:
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        run_training(world, values)
    finally:
        del sys.modules["wandb"]


def test_wandb_that_is_not_installed_is_named(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    values = settings(material, tmp_path / "run", ParallelConfig(), wandb="jam")
    with pytest.raises(RuntimeError, match=f"{UsageError.__name__}: wandb is 'jam', but"):
        pool.run(asks_for_wandb, ParallelConfig(), values)
