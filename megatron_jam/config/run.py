"""The typed settings of a training run; one YAML file, dotted overrides on the command line."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from megatron_jam.config.cli import parse
from megatron_jam.config.data import DataConfig, DataSetConfig, LoaderConfig
from megatron_jam.config.deepspeed import DeepSpeedConfig, check_deepspeed
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.health import HealthConfig
from megatron_jam.config.loss import LossConfig
from megatron_jam.config.model import PAIR
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.sheet import SheetConfig

FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What a rank's widths and tokens must be multiples of under each FP8 recipe."""


@dataclass(frozen=True, kw_only=True)
class FactorsConfig:
    """What the learning rate is multiplied with for each part of a model; all 1 in the paper."""

    main: float = 1.0
    """Layers of a model of one tower."""

    image: float = 1.0
    """Layers of a JAM-Cross's image tower."""

    text: float = 1.0
    """Layers of its text tower."""

    bridges: float = 1.0
    """Its bridges, which no parent has trained."""

    embeddings: float = 1.0
    """Tables of tokens and positions, and projections of them; tied output rows are these."""

    head: float = 1.0
    """The head's projections, norms and output rows of its own."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < math.inf:
                raise UsageError(
                    f"optimizer.factors.{name} is {value}; it must be above 0 (`freeze` leaves a"
                    " tower as it is)"
                )

    def changed(self) -> dict[str, float]:
        """Those that are not 1."""
        return {name: f for name, f in dataclasses.asdict(self).items() if f != 1}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay (OPT's and metaseq's settings)."""

    learning_rate: float = 3e-5
    """Peak rate (paper: 3e-5 alignment, 1e-5 instruction tuning)."""

    final_learning_rate: float = 3e-6
    """Rate at the last step; not stated in the paper, OPT ends at a tenth."""

    warmup_steps: int = 500
    """Steps of linear warm-up (paper: 500 alignment, 300 instruction tuning)."""

    beta1: float = 0.9
    """Decay of the first moment (OPT; not stated in the paper)."""

    beta2: float = 0.95
    """Decay of the second moment (OPT; not stated in the paper)."""

    epsilon: float = 1e-8
    """Added to the root of the second moment (OPT; not stated in the paper)."""

    weight_decay: float = 0.1
    """Decoupled decay of matrices (OPT; not stated in the paper)."""

    clip_norm: float = 1.0
    """Largest gradient norm; larger ones are scaled down to it (OPT; not stated in the paper)."""

    factors: FactorsConfig = field(default_factory=FactorsConfig)
    """Multiples of the learning rate by part of the model."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "final_learning_rate", "warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("epsilon", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = max(0.0, 1 - (step - self.warmup_steps) / max(1, steps - 1 - self.warmup_steps))
        return self.final_learning_rate + left * (self.learning_rate - self.final_learning_rate)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training phase: parents, continued pretraining and instruction tuning differ only here."""

    weights: Path
    """Weights folder that the run starts from."""

    output: Path
    """Folder for checkpoints, metrics, the resolved configuration and the final weights folder."""

    data: DataConfig
    """What is learnt from."""

    validation: list[DataSetConfig] = field(default_factory=list)
    """Sets measured without masking at the end and every `validate_every` steps."""

    steps: int = 0
    """Optimizer steps of the whole run; or give `samples`, `tokens` or `epochs` in its place."""

    samples: int = 0
    """Length of the run in samples, rounded up to whole steps."""

    tokens: int = 0
    """Length of the run in tokens, context_length for each sample, rounded up to whole steps."""

    epochs: float = 0.0
    """Length of the run in epochs, each with as many samples as the sets have in all, rounded up to
    whole steps. Which set is read how often depends on the weights, and is printed."""

    context_length: int
    """Tokens of a sample."""

    global_batch_size: int
    """Samples of one optimizer step over all ranks."""

    micro_batch_size: int = 1
    """Samples that one rank computes at once."""

    seed: int = 0
    """Seed of data order and masking."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Parameters and activations; with bf16 gradients and optimizer stay fp32."""

    engine: Literal["megatron", "deepspeed"] = "megatron"
    """What splits gradients and optimizer over the ranks: Megatron's distributed optimizer, with
    every layout, or DeepSpeed's ZeRO, which is data parallel alone."""

    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Settings of `engine: deepspeed`."""

    backend: Literal["torch", "transformer_engine"] = "torch"
    """Whose layers: torch's run everywhere, Transformer Engine's on NVIDIA GPUs alone."""

    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """How the layers' products are scaled to 8 bits, with transformer_engine and bf16: by the
    largest values of past steps, by this one's, or by those of blocks of 128 or of 32 values."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, attention scores, whole layers."""

    dropout: float = 0.0
    """Share of each residual branch's output that is zeroed in training."""

    freeze: list[str] = field(default_factory=list)
    """Towers of a JAM-Cross (image, text) whose parent's weights stay as they are; bridges,
    projections and shared tables learn."""

    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How samples are made."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""

    loss: LossConfig = field(default_factory=LossConfig)
    """What tokens count in training."""

    log_every: int = 10
    """Steps between log lines."""

    sheet: SheetConfig = field(default_factory=SheetConfig)
    """Pictures drawn at each validation."""

    wandb: str = ""
    """Project of Weights & Biases that the run reports to besides; none by default. Needs the
    package wandb."""

    validate_every: int = 0
    """Steps between validations; 0 validates at the end alone."""

    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end (or at `stop_at`) alone."""

    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""

    keep_every: int = 0
    """Besides, checkpoints after a multiple of so many steps are kept for ever; 0 for none."""

    keep_epochs: bool = False
    """Besides, at the end of each epoch of the sets the run is measured and saved, and that
    checkpoint is kept for ever."""

    async_checkpoints: bool = True
    """Whether training goes on while a checkpoint is written; takes memory on the host for what
    changes meanwhile, up to the size of a rank's part."""

    on_damage: Literal["stop", "previous"] = "stop"
    """What happens when the newest checkpoint is damaged: the run stops and says so, or puts it
    aside and takes the newest whole one."""

    health: HealthConfig = field(default_factory=HealthConfig)
    """What a run watches, and when it skips a step or stops."""

    stop_at: int = 0
    """Save and stop after this step, for a run in several jobs; 0 runs to the end."""

    def __post_init__(self) -> None:
        self._check_length()
        sizes = ("context_length", "global_batch_size", "micro_batch_size")
        for name in (*sizes, "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validate_every", "checkpoint_every", "keep_every", "stop_at", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if not set(self.freeze) <= set(PAIR):
            raise UsageError(f"freeze is {self.freeze}; it may hold image and text")
        self.parallel.check_length(self.context_length)
        self._check_backend()
        if self.engine == "deepspeed":
            check_deepspeed(self.parallel, self.backend)

    def _check_backend(self) -> None:
        parallel = self.parallel
        parallel.check_backend(self.backend)
        if parallel.context > 1 and self.data.isolate_documents:
            raise UsageError(
                "data.isolate_documents and parallel.context cannot go together: Transformer"
                " Engine's attention over several ranks takes no mask"
            )
        if self.fp8 == "none":
            return
        if self.backend != "transformer_engine" or self.precision != "bf16":
            raise UsageError(f"fp8 {self.fp8} needs backend transformer_engine and precision bf16")
        shared = parallel.context * (parallel.tensor if parallel.sequence else 1)
        tokens = self.micro_batch_size * self.context_length // shared
        if tokens % FP8_MULTIPLES[self.fp8]:
            raise UsageError(
                f"fp8 {self.fp8} needs a rank's micro_batch_size x context_length to be a multiple"
                f" of {FP8_MULTIPLES[self.fp8]}, not {tokens}"
            )

    def _check_length(self) -> None:
        given = {name: getattr(self, name) for name in ("steps", "samples", "tokens", "epochs")}
        if any(not 0 <= value < math.inf for value in given.values()):
            raise UsageError(f"steps, samples, tokens and epochs must be 0 or more: {given}")
        if sum(value > 0 for value in given.values()) != 1:
            raise UsageError(
                f"give the run's length as one of steps, samples, tokens and epochs: {given}"
            )

    def with_steps(self, epoch_size: float) -> "RunConfig":
        """The same run with its length in steps.

        Args:
            epoch_size: samples in an epoch of the data.
        """
        samples = self.samples or -(-self.tokens // self.context_length)
        samples = samples or math.ceil(self.epochs * epoch_size)
        steps = self.steps or -(-samples // self.global_batch_size)
        return dataclasses.replace(self, steps=steps, samples=0, tokens=0, epochs=0.0)

    def epoch_ends(self, epoch_size: float) -> frozenset[int]:
        """The steps of a run of known `steps` with which an epoch of `epoch_size` samples ends."""
        epochs = int(self.steps * self.global_batch_size / epoch_size)
        ends = (math.ceil(n * epoch_size / self.global_batch_size) for n in range(1, epochs + 1))
        return frozenset(ends)

    def length_as_text(self, epoch_size: float) -> str:
        """The length of a run of known `steps` in steps, samples, tokens and epochs."""
        samples = self.steps * self.global_batch_size
        return (
            f"{self.steps} steps = {samples} samples = {samples * self.context_length} tokens = "
            f"{samples / epoch_size:.3g} epochs"
        )

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of each rank in a step.

        Raises:
            UsageError: if micro_batch_size x data-parallel size does not divide global_batch_size.
        """
        at_once = self.micro_batch_size * self.parallel.data(world_size)
        if self.global_batch_size % at_once:
            raise UsageError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size"
                f" {self.micro_batch_size} x {at_once // self.micro_batch_size} replicas"
            )
        return self.global_batch_size // at_once

    def as_dict(self) -> dict[str, Any]:
        """The resolved settings as plain values."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML, which `load_run_config` reads back."""
        write_text_atomically(path, self.as_yaml())

    def as_yaml(self) -> str:
        """The resolved settings."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)


def load_run_config(arguments: Sequence[str] | None = None) -> RunConfig:
    """Parse `--config FILE.yaml` and dotted overrides such as `--optimizer.learning_rate 1e-4`.

    Raises:
        UsageError: an unknown key, a wrong value, a missing file; the message names it.
    """
    parser = _parser()
    values = parser.instantiate_classes(parse(parser, arguments))
    fields = [f.name for f in dataclasses.fields(RunConfig)]
    return RunConfig(**{name: values[name] for name in fields})


@cache
def _parser() -> ArgumentParser:
    """Made once: reading the docstrings of all settings takes longer than parsing."""
    parser = ArgumentParser(
        prog="megatron_jam.train",
        description="Train a weights folder on prepared data; resumes its own run.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
