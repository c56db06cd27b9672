"""The settings of a run: YAML, overrides, what is refused, the schedule."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_jam.config.data import Cm3Config, DataConfig, DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig, RunConfig, load_run_config

SETS = [{"name": "text", "path": "sets/text", "weight": 2.0}, {"name": "pairs", "path": "sets/p"}]
SETTINGS: dict[str, Any] = {
    "weights": "models/llm",
    "output": "runs/a",
    "data": {"sets": SETS, "objective": "cm3", "cm3": {"mask_whole_caption": 0.1}},
    "validation": [{"name": "held", "path": "sets/held"}],
    "steps": 100,
    "context_length": 64,
    "global_batch_size": 8,
    "precision": "bf16",
    "parallel": {"tensor": 2, "sequence": True},
    "optimizer": {"learning_rate": 1.0e-4, "warmup_steps": 10},
}
CONTEXT = {"backend": "transformer_engine", "parallel": {"context": 2}}
FP8 = {"backend": "transformer_engine", "fp8": "mxfp8"}


def file_of(folder: Path, **changes: Any) -> str:
    """A YAML file of SETTINGS with changes; None leaves a key out."""
    values = {k: v for k, v in {**SETTINGS, **changes}.items() if v is not None}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_yaml_becomes_typed_settings(tmp_path: Path) -> None:
    assert load_run_config(["--config", file_of(tmp_path)]) == RunConfig(
        weights=Path("models/llm"),
        output=Path("runs/a"),
        data=DataConfig(
            sets=[
                DataSetConfig(name="text", path="sets/text", weight=2.0),
                DataSetConfig(name="pairs", path="sets/p", weight=1.0),
            ],
            objective="cm3",
            cm3=Cm3Config(mask_whole_caption=0.1),
        ),
        validation=[DataSetConfig(name="held", path="sets/held")],
        steps=100,
        context_length=64,
        global_batch_size=8,
        precision="bf16",
        parallel=ParallelConfig(tensor=2, sequence=True),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=10),
    )


def test_dotted_overrides_win(tmp_path: Path) -> None:
    config = load_run_config(
        [
            *("--config", file_of(tmp_path)),
            *("--optimizer.learning_rate", "3e-4"),
            *("--parallel.pipeline", "4"),
            *("--data.cm3.max_spans", "2"),
            *("--steps", "7"),
            *("--output", "elsewhere"),
        ]
    )
    assert config.optimizer == OptimizerConfig(learning_rate=3e-4, warmup_steps=10)
    assert config.parallel == ParallelConfig(tensor=2, pipeline=4, sequence=True)
    assert config.data.cm3 == Cm3Config(mask_whole_caption=0.1, max_spans=2)
    assert (config.steps, config.output) == (7, Path("elsewhere"))


def test_saved_settings_load_again(tmp_path: Path) -> None:
    config = load_run_config(["--config", file_of(tmp_path)])
    config.save(tmp_path / "saved" / "run.yaml")
    assert load_run_config(["--config", str(tmp_path / "saved/run.yaml")]) == config
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "'stepz' is not accepted"),
        ({"optimizer": {"lr": 1}}, "'optimizer' does not accept option 'lr'"),
        ({"data": {"sets": SETS, "cm3": {"spans": 1}}}, "does not accept option 'cm3.spans'"),
        ({"data": {"sets": [{**SETS[0], "wait": 1}]}}, "data.sets.*'wait' is not accepted"),
        ({"validation": [{"name": "a"}]}, "validation.*required: path"),
        ({"steps": None}, "give the run's length as one of steps, samples, tokens and epochs"),
        ({"steps": "many"}, '"steps": Expected a .*int.* Got value: many'),
        ({"precision": "fp8"}, '"precision": Expected .*bf16.* Got value: fp8'),
        ({"parallel": {"tensor": 1.5}}, "parallel.tensor.*Got value: 1.5"),
        ({"steps": 0}, "give the run's length as one of .*'steps': 0"),
        ({"epochs": 2.0}, "give the run's length as one of .*'epochs': 2.0"),
        ({"steps": None, "tokens": -1}, "steps, samples, tokens and epochs must be 0 or more"),
        ({"loader": {"workers": -1}}, "loader.workers must be within 0..64, not -1"),
        ({"log_every": 0}, "^log_every is 0; it must be at least 1$"),
        ({"keep_checkpoints": 0}, "^keep_checkpoints is 0; it must be at least 1$"),
        ({"validate_every": -1}, "^validate_every is -1; it must be 0 or more$"),
        ({"parallel": {"pipeline": 0}}, "^parallel.pipeline is 0; it must be at least 1$"),
        ({"parallel": {"interleave": 2}}, "parallel.interleave needs parallel.pipeline"),
        ({"context_length": 63}, "a context_length that parallel.tensor 2 divides, not 63"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate is -1.0"),
        ({"data": {"sets": []}}, "data.sets needs one or more sets"),
        ({"backend": "apex"}, '"backend": Expected .*transformer_engine.* Got value: apex'),
        ({"parallel": {"context": 2}}, "parallel.context is 2, but .*; set it to 1"),
        ({**CONTEXT, "context_length": 62}, "parallel.context 2 needs .* that 4 divides, not 62"),
        (
            {**CONTEXT, "parallel": {"context": 2, "tensor": 3, "sequence": True}},
            "parallel.tensor 3 divides within a rank of parallel.context, not 64",
        ),
        (
            {**CONTEXT, "data": {"sets": SETS, "isolate_documents": True}},
            "data.isolate_documents and parallel.context cannot go together",
        ),
        ({"fp8": "delayed"}, "fp8 delayed needs backend transformer_engine and precision bf16"),
        ({**FP8, "precision": "fp32"}, "fp8 mxfp8 needs .* and precision bf16"),
        ({**FP8, "context_length": 40, "parallel": {}}, "to be a multiple of 32, not 40"),
        ({**FP8, "context_length": 32}, "to be a multiple of 32, not 16"),
    ],
)
def test_mistakes_are_one_line_that_names_them(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_run_config(["--config", file_of(tmp_path, **changes)])
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=f"does not exist: '{re.escape(missing)}'"):
        load_run_config(["--config", missing])
    (tmp_path / "broken.yaml").write_text("steps: [1,\noutput: x")
    with pytest.raises(UsageError, match="line 1, column 8") as caught:
        load_run_config(["--config", str(tmp_path / "broken.yaml")])
    assert "\n" not in str(caught.value)


def test_replicas_are_the_ranks_that_are_left() -> None:
    parallel = ParallelConfig(tensor=2, pipeline=2)
    assert [parallel.data(n) for n in (4, 8, 256)] == [1, 2, 64]
    with pytest.raises(UsageError, match=r"2 x parallel.pipeline 2 does not divide the 6 ranks"):
        parallel.data(6)
    shared = ParallelConfig(tensor=2, context=2)
    assert [shared.data(n) for n in (4, 8)] == [1, 2]
    with pytest.raises(UsageError, match=r"x parallel.context 2 does not divide the 6 ranks"):
        shared.data(6)


def test_transformer_engine_takes_shared_sequences_and_fp8(tmp_path: Path) -> None:
    parallel = {"context": 2, "tensor": 2, "sequence": True}
    path = file_of(tmp_path, **FP8, parallel=parallel, context_length=128)
    config = load_run_config(["--config", path])
    assert (config.backend, config.fp8, config.parallel.context) == (
        "transformer_engine",
        "mxfp8",
        2,
    )


def test_micro_batches_of_a_step(tmp_path: Path) -> None:
    path = file_of(tmp_path, micro_batch_size=2, global_batch_size=12)
    config = load_run_config(["--config", path])
    assert config.num_micro_batches(2) == 6
    assert config.num_micro_batches(6) == 2
    with pytest.raises(UsageError, match="is not a multiple of micro_batch_size 2 x 4 replicas"):
        config.num_micro_batches(8)


def test_schedule() -> None:
    """Up to the peak by the last warm-up step, then down to the final rate at the last step."""
    optimizer = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)
    rates = [optimizer.rate(step, 14) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[13] == pytest.approx(0.1, rel=1e-12)
    falls = [a - b for a, b in pairwise(rates[4:])]
    assert falls == pytest.approx([0.1] * 9)
    # A run that goes on past its end stays there.
    assert optimizer.rate(20, 14) == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 3), (0, 1), (3, 3), (5, 3), (2, 3)])
def test_schedules_without_warm_up_or_decay(warmup: int, steps: int) -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=warmup)
    rates = [optimizer.rate(step, steps) for step in range(steps)]
    due = {
        (0, 3): [1.0, 0.55, 0.1],
        (0, 1): [1.0],
        (3, 3): [1 / 3, 2 / 3, 1.0],
        (5, 3): [0.2, 0.4, 0.6],
        (2, 3): [0.5, 1.0, 1.0],
    }
    assert rates == pytest.approx(due[warmup, steps])


def test_paper_alignment_phase() -> None:
    """3e-5 after 500 of 5960 steps (paper section 3.1), a tenth at the end (OPT)."""
    optimizer = OptimizerConfig()
    assert optimizer.rate(0, 5960) == pytest.approx(6e-8)
    assert optimizer.rate(499, 5960) == 3e-5
    assert optimizer.rate(5959, 5960) == pytest.approx(3e-6)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"steps": 7}, 7),
        ({"samples": 33}, 5),
        ({"samples": 32}, 4),
        ({"tokens": 32 * 64}, 4),
        ({"tokens": 32 * 64 + 1}, 5),
        ({"epochs": 2.0}, 25),  # 200 samples, 8 a step
        ({"epochs": 0.5}, 7),
    ],
)
def test_length_in_any_unit(length: dict[str, Any], steps: int) -> None:
    data = DataConfig(sets=[DataSetConfig(name="a", path="p")])
    paths = {"weights": Path("w"), "output": Path("o")}
    config = RunConfig(**paths, data=data, context_length=64, global_batch_size=8, **length)
    resolved = config.with_steps(100.0)
    assert resolved.steps == steps
    assert resolved.with_steps(50.0) == resolved  # and stays so
    assert resolved.length_as_text(100.0) == (
        f"{steps} steps = {8 * steps} samples = {512 * steps} tokens = {0.08 * steps:.3g} epochs"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": ParallelConfig(tensor=2)}, "parallel.tensor is 2: set it to 1"),
        ({"parallel": ParallelConfig(pipeline=4)}, "parallel.pipeline is 4: set it to 1"),
        ({"parallel": ParallelConfig(overlap_gradients=True)}, "parallel.overlap_gradients is for"),
        ({"backend": "transformer_engine"}, "takes backend torch, not transformer_engine"),
        (
            {"backend": "transformer_engine", "parallel": ParallelConfig(context=2)},
            "parallel.context is 2: set it to 1",
        ),
    ],
)
def test_deepspeed_is_data_parallel_alone(changes: dict[str, Any], message: str) -> None:
    data = DataConfig(sets=[DataSetConfig(name="a", path="p")])
    values = {"weights": Path("w"), "output": Path("o"), "data": data, "steps": 1}
    values |= {"context_length": 64, "global_batch_size": 8, "engine": "deepspeed"}
    assert RunConfig(**values).deepspeed.stage == 2
    with pytest.raises(UsageError, match=message):
        RunConfig(**values, **changes)


@pytest.mark.parametrize(
    ("epoch_size", "ends"), [(40.0, {5, 10}), (39.0, {5, 10}), (41.0, {6}), (81.0, set())]
)
def test_steps_with_which_an_epoch_ends(epoch_size: float, ends: set[int]) -> None:
    """Of 10 steps of 8 samples."""
    data = DataConfig(sets=[DataSetConfig(name="a", path="p")])
    paths = {"weights": Path("w"), "output": Path("o")}
    config = RunConfig(**paths, data=data, context_length=64, global_batch_size=8, steps=10)
    assert config.epoch_ends(epoch_size) == ends
