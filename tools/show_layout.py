"""Show what a model takes on the ranks of a layout: a table of its pipeline stages."""

import dataclasses
import sys
from collections.abc import Sequence
from itertools import groupby
from json import dumps
from pathlib import Path
from typing import Any, Literal

from megatron_jam.config.cli import run_command
from megatron_jam.config.deepspeed import DeepSpeedConfig, check_deepspeed
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json, read_settings
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.parameters import num_parameters
from megatron_jam.planning.flops import model_flops, stage_flops
from megatron_jam.planning.memory import plan
from megatron_jam.weights.folder import CONFIG

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
COLUMNS = [
    *("stage", "layers", "bridges", "parameters", "compute", "in flight", "weights", "gradients"),
    *("optimizer", "none", "selective", "full", "total"),
]
NOTES = """
bridges: each way counts; parameters: of the stage, a tied table where it is first used
compute: the stage's share of the FLOPs; in flight: forward passes that wait for their backward
bytes: on each rank of the stage, as a CPU would hold them; bf16 attention takes less on a GPU"""
ZERO_NOTE = """besides: layers that stage 3 has gathered, buckets of gradients on their way; and,
for a moment at the start, the weights whole; on the host, while a checkpoint is written, all
weights and the optimizer's state, shared out over the ranks"""


def main(
    config: Path,
    *,
    vocab_size: int = 0,
    parallel: ParallelConfig = ParallelConfig(),
    replicas: int = 1,
    micro_batch_size: int = 1,
    global_batch_size: int = 0,
    context_length: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    recompute: Literal["none", "selective", "full"] = "none",
    freeze: list[str] | None = None,
    engine: Literal["megatron", "deepspeed"] = "megatron",
    deepspeed: DeepSpeedConfig = DeepSpeedConfig(),
    json: bool = False,
) -> None:
    """Print a model's exact number of parameters and what a rank of each pipeline stage holds.

    All of it is computed from the settings: nothing is built, so any model fits.

    Args:
        config: a model's YAML or JSON, or a weights folder.
        vocab_size: token ids, for a YAML that leaves them to the tokenizer.
        parallel: layout.
        replicas: data-parallel replicas.
        micro_batch_size: samples that a rank computes at once.
        global_batch_size: samples of a step; 0 takes two micro-batches for each stage.
        context_length: tokens of a sample; 0 takes the model's max_positions.
        precision: of weights and activations.
        recompute: whose activations the total counts.
        freeze: towers (image, text) whose parent's weights have no gradients.
        engine: what splits gradients and optimizer; deepspeed takes replicas alone.
        deepspeed: what ZeRO shares out, and whether the host has the optimizer.
        json: print one JSON object, in bytes, in place of the table.
    """
    model = read_model(config, vocab_size)
    if engine == "deepspeed":
        check_deepspeed(parallel, "torch")
    settings = {
        "parallel": dataclasses.asdict(parallel),
        "replicas": replicas,
        "micro_batch_size": micro_batch_size,
        "global_batch_size": global_batch_size
        or 2 * parallel.pipeline * micro_batch_size * replicas,
        "context_length": context_length or model.max_positions,
        "precision": precision,
        "recompute": recompute,
        "freeze": freeze or [],
        "deepspeed": dataclasses.asdict(deepspeed) if engine == "deepspeed" else None,
    }
    check_settings(model, settings)
    layout = describe(model, parallel, settings)
    sys.stdout.write((dumps(layout, indent=2) if json else as_text(layout)) + "\n")


def check_settings(model: ModelConfig, settings: dict[str, Any]) -> None:
    """Raise UsageError unless sizes and `freeze` are such as the model can have."""
    for name in ("replicas", "micro_batch_size"):
        if settings[name] < 1:
            raise UsageError(f"{name} is {settings[name]}; it must be at least 1")
    frozen, length = settings["freeze"], settings["context_length"]
    if not set(frozen) <= set(model.tower_names if model.is_pair else ()):
        raise UsageError(f"freeze is {frozen}; it may hold towers image and text of a pair")
    if not 1 <= length <= model.max_positions:
        raise UsageError(f"context_length is {length}; max_positions is {model.max_positions}")
    size, replicas = settings["micro_batch_size"], settings["replicas"]
    samples = settings["global_batch_size"]
    if samples < 1 or samples % (size * replicas):
        raise UsageError(
            f"global_batch_size {samples} is not a multiple of micro_batch_size {size} x {replicas}"
            " replicas"
        )


def describe(
    model: ModelConfig, parallel: ParallelConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """`settings`, what the whole model is, and for each stage what a rank of it holds, in bytes."""
    length, replicas = settings["context_length"], settings["replicas"]
    at_once = settings["micro_batch_size"] * replicas
    stages = plan(
        model,
        parallel,
        replicas=replicas,
        micro_batch_size=settings["micro_batch_size"],
        num_micro_batches=settings["global_batch_size"] // at_once,
        context_length=length,
        precision=settings["precision"],
        frozen=settings["freeze"],
        zero=DeepSpeedConfig(**settings["deepspeed"]) if settings["deepspeed"] else None,
    )
    counted = {"context_length": length, "frozen": settings["freeze"]}
    whole = model_flops(model, **counted)
    rows = []
    for stage, flops in zip(stages, stage_flops(model, parallel, **counted), strict=True):
        row = dataclasses.asdict(stage)
        row |= row.pop("state")
        row["flops_share"] = flops.forward / whole.forward
        row["total"] = stage.state.total + stage.activations[settings["recompute"]]
        rows.append(row)
    return {
        "parameters": num_parameters(model),
        "training_flops_per_token": whole.training,
        "training_flops_per_token_full": model_flops(model, attention="full", **counted).training,
        "ranks": parallel.tensor * parallel.pipeline * parallel.context * replicas,
        **settings,
        "stages": rows,
    }


def read_model(path: Path, vocab_size: int) -> ModelConfig:
    """The model in a YAML or JSON file or a weights folder."""
    path = path / CONFIG if path.is_dir() else path
    # JSON writes 1e-05, which YAML reads as text.
    values = read_json(path) if path.suffix == ".json" else read_settings(path)
    if vocab_size:
        values["vocab_size"] = vocab_size
    if "towers" not in values:
        raise UsageError(f"{path} describes no model: it has no `towers`")
    if "vocab_size" not in values:
        raise UsageError(f"{path} has no vocab_size: add --vocab_size, the tokenizer's ids")
    return ModelConfig.from_dict(values)


def as_text(layout: dict[str, Any]) -> str:
    """The layout as lines to read."""
    rows = [COLUMNS, *map(_row, layout["stages"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    first, last = COLUMNS.index("none"), COLUMNS.index("full")
    over = sum(widths[first : last + 1]) + 2 * (last - first)
    title = "activations by recompute".rjust(over)
    return "\n".join(
        [
            f"{layout['parameters']:,} parameters,"
            f" {layout['training_flops_per_token'] / 1e9:.4g} GFLOPs a token in training"
            f" ({layout['training_flops_per_token_full'] / 1e9:.4g} with whole score matrices)",
            f"{layout['ranks']} rank(s): {_degrees(layout)}",
            f"steps of {layout['global_batch_size']} x {layout['context_length']} tokens,"
            f" {layout['micro_batch_size']} x {layout['context_length']} at once on a rank;"
            f" {layout['precision']}",
            "",
            " " * (sum(widths[:first]) + 2 * first) + title,
            *("  ".join(map(str.rjust, row, widths)) for row in rows),
            NOTES,
            f"total: all of these, with the activations of recompute {layout['recompute']}",
            *(_zero_notes(layout) if layout["deepspeed"] else []),
        ]
    )


def _zero_notes(layout: dict[str, Any]) -> list[str]:
    (row,) = layout["stages"]
    host = f"on the host: gradients and optimizer, {size(row['host'])} of each rank"
    return [*([host] if row["host"] else []), ZERO_NOTE]


def _degrees(layout: dict[str, Any]) -> str:
    parallel = layout["parallel"]
    degrees = [("TP", "tensor"), ("PP", "pipeline"), ("CP", "context")]
    text = " x ".join(f"{letters} {parallel[name]}" for letters, name in degrees)
    text += f" x DP {layout['replicas']}"
    if parallel["interleave"] > 1:
        text += f", {parallel['interleave']} chunks of layers a stage"
    zero = layout["deepspeed"]
    if zero:
        text += f", ZeRO-{zero['stage']}"
        text += ", optimizer on the host" if zero["offload_optimizer"] else ""
    return text + (", sequence parallel" if parallel["sequence"] else "")


def _row(stage: dict[str, Any]) -> Sequence[str]:
    activations = stage["activations"]
    return [
        str(stage["stage"]),
        spans(stage["layers"]),
        str(stage["bridges"]),
        f"{stage['parameters']:,}",
        f"{stage['flops_share']:.1%}",
        str(stage["micro_batches"]),
        *(size(stage[name]) for name in ("weights", "gradients", "optimizer")),
        *(size(activations[name]) for name in ("none", "selective", "full")),
        size(stage["total"]),
    ]


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers as runs: 0-3,8-11."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def size(num_bytes: float) -> str:
    """Bytes with three digits and a unit of a thousand."""
    unit = 0
    while num_bytes >= 999.5 and unit < len(UNITS) - 1:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return f"{num_bytes:.3g} {UNITS[unit]}"


if __name__ == "__main__":
    run_command(main)
