"""How fast a model trains under one layout: random weights, random tokens, a few timed steps.

Run by tools/benchmark_throughput.py on every rank, in a process of its own, so that what fails (out
of memory, a layout that does not fit) leaves nothing behind:

    python -m megatron_jam.training.throughput TRIAL.json RESULT.json
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, write_text_atomically
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.models.jam import JamModel, check_layout
from megatron_jam.parallel.device import DTYPES, device_name, peak_memory_bytes, synchronize
from megatron_jam.parallel.world import World, start_world
from megatron_jam.planning.devices import peak_flops, speed
from megatron_jam.planning.flops import model_flops
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.step import Batch, ForwardBackward, train_step

WARMUP_STEPS = 2
"""Steps before the clock starts: caches fill, kernels are chosen, the optimizer gets its state."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is timed."""

    model: dict[str, Any]
    """Settings of the model, as `ModelConfig.from_dict` reads them."""

    parallel: ParallelConfig
    micro_batch_size: int
    recompute: Literal["none", "selective", "full"]
    context_length: int
    global_batch_size: int
    precision: Literal["fp32", "bf16"]
    backend: Literal["torch", "transformer_engine"] = "torch"
    steps: int = 5

    @property
    def name(self) -> str:
        """The layout in short, such as tp2-sp-pp2 mb1 full."""
        parallel = self.parallel
        parts = [
            f"tp{parallel.tensor}",
            "sp" if parallel.sequence else "",
            f"pp{parallel.pipeline}",
        ]
        layout = "-".join(part for part in parts if part)
        return f"{layout} mb{self.micro_batch_size} {self.recompute}"

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_text_atomically(path, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Trial":
        """Read what `save` wrote."""
        values = read_json(path)
        return cls(**{**values, "parallel": ParallelConfig(**values["parallel"])})


def measure(trial: Trial) -> dict[str, Any]:
    """Time a trial; all ranks take part and get the same.

    Raises:
        UsageError: the layout does not fit the model or the ranks.
    """
    model = ModelConfig.from_dict(trial.model)
    check_layout(model, trial.parallel)
    world = start_world(trial.parallel)
    at_once = trial.micro_batch_size * world.data.size
    if trial.global_batch_size % at_once:
        raise UsageError(f"{trial.global_batch_size} samples do not divide by {at_once} at once")
    count = trial.global_batch_size // at_once
    trial.parallel.check_micro_batches(count)
    trial.parallel.check_length(trial.context_length)
    step, optimizer = _build(trial, model, world)
    batches = [_random_batch(trial, model, world, number) for number in range(count)]
    rate = OptimizerConfig().learning_rate
    for _ in range(WARMUP_STEPS):
        train_step(step, optimizer, batches, rate)
    synchronize(world.device)
    start = time.perf_counter()
    for _ in range(trial.steps):
        train_step(step, optimizer, batches, rate)
    # The slowest rank's.
    found = torch.tensor(
        [(time.perf_counter() - start) / trial.steps, float(peak_memory_bytes(world.device))],
        dtype=torch.float64,
        device=world.device,
    )
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    seconds, memory = found.tolist()
    return {**_figures(trial, model, world, seconds), "peak_memory_bytes": int(memory)}


def _figures(trial: Trial, model: ModelConfig, world: World, seconds: float) -> dict[str, Any]:
    tokens = trial.global_batch_size * trial.context_length / seconds
    name = device_name(world.device)
    reached = speed(
        tokens,
        causal=model_flops(model, context_length=trial.context_length),
        full=model_flops(model, context_length=trial.context_length, attention="full"),
        ranks=world.size,
        peak=peak_flops(name, precision=trial.precision),
    )
    return {
        "seconds_per_step": seconds,
        "tokens_per_second_per_rank": tokens / world.size,
        **dataclasses.asdict(reached),
        "device": name,
        "ranks": world.size,
    }


def _build(trial: Trial, model: ModelConfig, world: World) -> tuple[ForwardBackward, Any]:
    chunks = [
        JamModel(
            model,
            world,
            dtype=DTYPES[trial.precision],
            recompute=trial.recompute,
            backend=trial.backend,
            chunk=chunk,
        )
        for chunk in range(trial.parallel.interleave)
    ]
    with torch.no_grad():
        for weight in (each for chunk in chunks for each in chunk.parameters()):
            weight.normal_(0, model.init_std)
    wrapped = wrap_chunks(chunks, world)
    # All but the rows of one picture's code, one sentinel, <break> and <eoss> are text.
    vocabulary = JointVocabulary.build(
        text_size=model.vocab_size - 4, num_image_codes=1, num_sentinels=1
    )
    return ForwardBackward(wrapped, world, vocabulary), build_optimizer(wrapped, OptimizerConfig())


def _random_batch(trial: Trial, model: ModelConfig, world: World, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number * world.data.size + world.data.rank)
    shape = (trial.micro_batch_size, trial.context_length + 1)
    tokens = torch.randint(4, model.vocab_size, shape, generator=generator)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(shape[0], trial.context_length),
        "positions": torch.arange(trial.context_length).repeat(shape[0], 1),
    }


def main(trial: str, result: str) -> None:
    """Measure TRIAL; rank 0 writes RESULT. What fails is said on standard error, in one line."""
    try:
        found = measure(Trial.load(Path(trial)))
    except Exception as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(f"\nreason: {type(error).__name__}: {told[0]}\n")
        sys.stderr.flush()
        raise SystemExit(1) from error
    if dist.get_rank() == 0:
        write_text_atomically(result, json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
