"""Try layouts, micro-batches and recomputation of a model on the devices at hand, and time them.

Each combination runs in processes of its own, so that one that fails (out of memory, a layout that
does not fit, a hang) is listed with its reason, and the next one is tried.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Literal

import matplotlib
import torch.distributed as dist

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, read_settings, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.evaluation.sweep import as_table, possible_layouts, run_trial
from megatron_jam.training.throughput import Trial

Recompute = Literal["none", "selective", "full"]


def main(
    config: Path,
    output: Path,
    *,
    context_length: int,
    global_batch_size: int,
    vocab_size: int = 0,
    layouts: list[ParallelConfig] | None = None,
    micro_batch_sizes: list[int] | None = None,
    recompute: list[Recompute] | None = None,
    precision: Literal["fp32", "bf16"] = "bf16",
    backend: Literal["torch", "transformer_engine"] = "torch",
    steps: int = 5,
    timeout: float = 600.0,
    compare: Path | None = None,
) -> None:
    """Time a few training steps of each combination; print a table, write OUTPUT and its picture.

    The same command on two CPU ranks and on 256 GPUs, weights and tokens being random:

        torchrun --nproc_per_node 2 tools/benchmark_throughput.py MODEL.yaml sweep.json
            --context_length 128 --global_batch_size 8

    Args:
        config: YAML or JSON of a model.
        output: JSON file of the results; the picture is beside it, as .png.
        context_length: tokens of a sample.
        global_batch_size: samples of a step over all ranks.
        vocab_size: token ids, for a YAML that leaves them to the tokenizer.
        layouts: layouts to try; by default every TP (with sequence parallelism) x PP of powers of
            two that fit.
        micro_batch_sizes: samples at once on a rank; by default 1.
        recompute: none, selective or full; by default none and full.
        precision: of weights and activations.
        backend: whose layers.
        steps: timed steps of each.
        timeout: seconds after which a combination has failed.
        compare: results of an earlier sweep, whose speed is the last column's denominator.
    """
    values = read_json(config) if config.suffix == ".json" else read_settings(config)
    values |= {"vocab_size": vocab_size} if vocab_size else {}
    model = ModelConfig.from_dict(values)
    _check_sizes(model, steps, global_batch_size, context_length)
    earlier = {row["name"]: row for row in read_json(compare)["rows"]} if compare else {}
    _join()
    sizes = {"context_length": context_length, "global_batch_size": global_batch_size}
    fixed = {"model": values, **sizes, "precision": precision}
    chosen = layouts or list(possible_layouts(model, dist.get_world_size()))
    places = ("parallel", "micro_batch_size", "recompute")
    rows = []
    for each in itertools.product(chosen, micro_batch_sizes or [1], recompute or ["none", "full"]):
        settings = dict(zip(places, each, strict=True))
        trial = Trial(**fixed, **settings, backend=backend, steps=steps)
        rows.append(_tried(trial, timeout))
    if dist.get_rank() == 0:
        sys.stdout.write(as_table(rows, earlier) + "\n")
        write_text_atomically(output, json.dumps({**fixed, "rows": rows}, indent=2) + "\n")
        draw(rows, output.with_suffix(".png"))
    dist.destroy_process_group()


def _check_sizes(
    model: ModelConfig, steps: int, global_batch_size: int, context_length: int
) -> None:
    if steps < 1 or global_batch_size < 1 or not 1 <= context_length <= model.max_positions:
        raise UsageError(
            "steps and global_batch_size must be at least 1, context_length at most the model's"
            f" max_positions {model.max_positions}"
        )


def _tried(trial: Trial, timeout: float) -> dict:
    """The row of a trial."""
    found = run_trial(trial, timeout=timeout)
    logger.info("%s: %s", trial.name, found.get("failure") or f"{found['tflops']:.3g} TFLOP/s")
    return {"name": trial.name, **found}


def draw(rows: list[dict], path: Path) -> None:
    """Speed over memory of what worked, one point for each combination."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for row in (each for each in rows if "failure" not in each):
        place = (row["peak_memory_bytes"] / 1e9, row["tokens_per_second_per_rank"])
        axes.plot(*place, "o")
        axes.annotate(row["name"], place, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="peak memory of a rank, GB", ylabel="tokens a second and rank")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _join() -> None:
    """A group for talking between the trials, on the CPU; of one rank without torchrun."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


if __name__ == "__main__":
    run_command(main)
