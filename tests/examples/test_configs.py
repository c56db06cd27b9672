"""Configurations that ship are read, have the paper's numbers, fit, and have twins that run."""

import math
import os
from functools import cache
from pathlib import Path

import pytest
import yaml

from examples.configs.tiny.run import PHASES, arguments, main
from examples.configs.tiny.workspace import build_workspace, fuse_all
from megatron_jam.config.files import read_settings
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.run import RunConfig, load_run_config
from megatron_jam.evaluation.sampled_sheet import SampledSheet
from megatron_jam.models.parameters import POSITIONS, num_parameters, parameter_table
from megatron_jam.parallel.world import World
from megatron_jam.planning.memory import plan
from megatron_jam.training.checkpoint import complete_checkpoints
from megatron_jam.training.metrics import read_metrics
from tests.helpers.pool import WorkerPool
from tests.helpers.training import build_training

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
COUNTS = {
    "cm3leon_350m": 373_827_584,
    "cm3leon_760m": 787_233_792,
    "tower": 6_729_801_728,
    "width": 26_344_505_344,
    "cross_none": 13_205_807_104,
    "cross_every1": 26_090_708_992,
    "cross_every2": 19_648_258_048,
    "cross_every4": 16_427_032_576,
}
"""Parameters of the paper's parents, JAM-Width, and JAM-Cross by bridges (table 4)."""

DEVICE_BYTES = 80e9
"""Of the GPUs that the layouts are made for."""


def model_of(phase: str) -> ModelConfig:
    """The model that a phase trains."""
    kind, name = phase.split("/")
    if kind == "parents":
        name = name if name in COUNTS else "tower"
    elif name in ("uniform",):
        name = "tower"
    elif name.startswith("width"):
        name = "width"
    elif name not in COUNTS:
        name = "cross_every2"
    return ModelConfig.from_dict(read_settings(CONFIGS / "models" / f"{name}.yaml"))


RANKS = {
    **dict.fromkeys(PHASES, 256),
    "parents/cm3leon_7b": 512,
    "instruction/with_pairs": 64,
    "instruction/without_pairs": 64,
    "instruction/one_node": 8,
}


@cache
def read(phase: str) -> RunConfig:
    return load_run_config(["--config", str(CONFIGS / f"{phase}.yaml")])


def test_every_file_is_known() -> None:
    assert {path.stem for path in (CONFIGS / "models").iterdir()} == COUNTS.keys()
    found = {
        str(path.relative_to(CONFIGS).with_suffix(""))
        for path in CONFIGS.glob("*/*.yaml")
        if path.parent.name not in ("models", "tiny")
    }
    assert found == set(PHASES)


@pytest.mark.parametrize("name", COUNTS)
def test_exact_count(name: str) -> None:
    model = ModelConfig.from_dict(read_settings(CONFIGS / "models" / f"{name}.yaml"))
    assert num_parameters(model) == COUNTS[name]
    shapes = {entry.name: entry.shape for entry in parameter_table(model)}
    assert shapes[POSITIONS][0] == 4_098
    assert model.vocab_size == 66_056


PLANNED = (
    *("parents/cm3leon_7b", "alignment/uniform", "alignment/width", "alignment/cross"),
    "instruction/one_node",
)
"""The others' plans take as long again."""


@pytest.mark.parametrize(
    "phase",
    [*PLANNED, *(pytest.param(p, marks=pytest.mark.slow) for p in PHASES if p not in PLANNED)],
)
def test_layout_fits_its_gpus(phase: str) -> None:
    """As many micro-batches as the file says, in 80 GB with a tenth to spare; buckets of gradients
    that checkpoints can hold."""
    config, model = read(phase), model_of(phase)
    replicas = config.parallel.data(RANKS[phase])
    count = config.num_micro_batches(RANKS[phase])
    stages = plan(
        model,
        config.parallel,
        replicas=replicas,
        micro_batch_size=config.micro_batch_size,
        num_micro_batches=count,
        context_length=config.context_length,
        precision=config.precision,
        zero=config.deepspeed if config.engine == "deepspeed" else None,
    )
    for stage in stages:
        held = stage.state.total + stage.activations[config.recompute]
        assert held < 0.9 * DEVICE_BYTES
    text = (CONFIGS / f"{phase}.yaml").read_text().replace("\n# ", " ")
    tensor = config.parallel.tensor
    assert f"TP {tensor} x PP 1 x DP {replicas}, {count} micro-batches" in text
    assert f"of {config.micro_batch_size} a step" in text
    assert str(RANKS[phase]) in text
    for entry in parameter_table(model):
        share = math.prod(entry.shape) // (tensor if entry.split is not None else 1)
        assert share % math.lcm(replicas, 128) == 0, entry.name


@pytest.mark.parametrize("phase", PHASES)
def test_what_the_paper_does_not_state_is_marked(phase: str) -> None:
    config, text = read(phase), (CONFIGS / f"{phase}.yaml").read_text()
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert optimizer.final_learning_rate == pytest.approx(optimizer.learning_rate / 10)
    assert "  # Not in the paper: OPT's and metaseq's.\n  beta1: 0.9" in text
    assert "# not in the paper: linear decay to a tenth" in text
    if len(config.data.sets) > 1 and phase.startswith("alignment"):
        assert "# Not in the paper: 30B tokens of pairs and 30B of text" in text
    assert (config.loss.z, config.loss.text, config.loss.image) == (0, 1, 1)


@pytest.mark.parametrize("name", ["uniform", "width", "cross"])
def test_alignment_is_the_papers(name: str) -> None:
    config = read(f"alignment/{name}")
    assert config.steps == 5960
    assert config.global_batch_size * config.context_length == 2048 * 4096
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (3e-5, 500)
    assert config.data.objective == "cm3"
    weights = {each.name: each.weight for each in config.data.sets}
    assert weights["shutterstock"] == 0.5
    assert sum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["with_pairs", "without_pairs", "one_node"])
def test_instruction_tuning_is_the_papers(name: str) -> None:
    config = read(f"instruction/{name}")
    assert config.global_batch_size * config.context_length == 256 * 4096
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (1e-5, 300)
    assert ("shutterstock" in {each.name for each in config.data.sets}) != (name == "without_pairs")
    assert (config.epochs, config.keep_epochs, config.steps) == (15, True, 0)


def test_one_node_is_that_with_another_engine() -> None:
    one, other = read("instruction/one_node").as_dict(), read("instruction/with_pairs").as_dict()
    assert {name for name in one if one[name] != other[name]} == {
        *("output", "micro_batch_size", "recompute", "engine", "deepspeed", "parallel")
    }


@pytest.mark.parametrize("phase", PHASES)
def test_phases_with_pictures_draw_them(phase: str) -> None:
    sheet = read(phase).sheet
    assert len(sheet.captions) == (0 if phase.startswith("parents/llm") else 8)
    assert (sheet.sampling.guidance_scale, sheet.sampling.top_p) == (3.5, 0.9), "the paper's"


def test_ablations_are_the_papers() -> None:
    half = {read(f"ablations/cross_{n}").steps for n in ("none", "every1", "every2", "every4")}
    whole = {read(f"ablations/width_{n}").steps for n in ("copy", "average")}
    assert (half, whole) == ({2980}, {5960})


@pytest.mark.parametrize(
    ("size", "rate", "tokens"), [("350m", 6e-4, 1.4), ("760m", 5e-4, 1.9), ("7b", 1.2e-4, 2.4)]
)
def test_parents_are_cm3leons(size: str, rate: float, tokens: float) -> None:
    config = read(f"parents/cm3leon_{size}")
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (rate, 1500)
    seen = config.steps * config.global_batch_size * config.context_length
    assert seen / 1e12 == pytest.approx(tokens, rel=1e-5)


def test_llm_is_extended_on_30b_tokens() -> None:
    first, second = read("parents/llm"), read("parents/llm_4096")
    assert (first.context_length, second.context_length) == (2048, 4096)
    assert second.weights == first.output / "weights"
    seen = second.steps * second.global_batch_size * second.context_length
    assert seen == pytest.approx(30e9, rel=1e-4)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the phases name, in small."""
    folder = tmp_path_factory.mktemp("tiny")
    build_workspace(folder)
    fuse_all(folder)
    return folder


def train(world: World, folder: Path, options: list[str]) -> None:
    """A run as `megatron_jam.train` makes it in `folder`."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        config = load_run_config(options)
        sheet = SampledSheet(config, writes=world.rank == 0)
        build_training(world, {name: getattr(config, name) for name in vars(config)}, [sheet]).run()
    finally:
        os.chdir(before)


@pytest.mark.parametrize("phase", PHASES)
def test_a_twin_differs_in_size_alone(phase: str) -> None:
    config, small = read(phase), load_run_config(arguments(phase))
    whole, twin = config.as_dict(), small.as_dict()
    assert {name for name in whole if whole[name] != twin[name]} <= {
        *("steps", "context_length", "global_batch_size", "micro_batch_size", "precision"),
        *("parallel", "optimizer", "log_every", "validate_every", "checkpoint_every"),
        *("epochs",),
    }
    changed = {n for n, v in vars(config.optimizer).items() if v != getattr(small.optimizer, n)}
    assert changed == {"warmup_steps"}
    assert yaml.safe_load((CONFIGS / "tiny" / "steps.yaml").read_text())["parallel"]["tensor"] == 2


@pytest.mark.parametrize(
    "phase",
    ["alignment/cross", pytest.param("ablations/width_average", marks=pytest.mark.slow)],
)
def test_a_twin_runs(pool: WorkerPool, phase: str, workspace: Path) -> None:
    config = load_run_config(arguments(phase))
    data = 2 // config.parallel.tensor
    pool.run(train, config.parallel, workspace, arguments(phase), data=data)
    check(workspace / config.output, config)


def check(output: Path, config: RunConfig) -> None:
    """A run has made all its steps, saved, measured and exported."""
    lines = read_metrics(output / "metrics.jsonl")
    losses = [each["loss"] for each in lines if each["kind"] == "train"]
    assert len(losses) == read_settings(output / "run.yaml")["steps"] >= 4
    assert all(0 < each < 10 for each in losses)
    assert {each["set"] for each in lines if each["kind"] == "validation"} >= {
        each.name for each in config.validation
    }
    measured = {each["step"] for each in lines if each["kind"] == "validation"}
    drawn = {int(path.stem.removeprefix("step-")) for path in (output / "sheets").glob("*.png")}
    assert drawn == (measured if config.sheet.captions else set())
    assert complete_checkpoints(output / "checkpoints")
    assert (output / "weights" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_twins_run_one_after_the_other(tmp_path: Path) -> None:
    """Under torchrun on two ranks, each phase from what those before it have made."""
    main(tmp_path / "tiny")
    for phase in PHASES:
        config = load_run_config(arguments(phase))
        check(tmp_path / "tiny" / config.output, config)
