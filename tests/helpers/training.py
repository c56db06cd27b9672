"""Whole training runs of pico models, which worker processes make."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_jam.config.data import Cm3Config, DataConfig, DataSetConfig
from megatron_jam.config.model import BridgeConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig, RunConfig
from megatron_jam.data.indexed import write_set
from megatron_jam.evaluation.perplexity import measure_sets
from megatron_jam.models.parameters import parameter_table
from megatron_jam.models.sharding import holders, unpack
from megatron_jam.parallel.world import World
from megatron_jam.training.callbacks import Callback
from megatron_jam.training.loop import Training
from megatron_jam.training.losses import Losses
from megatron_jam.training.preflight import check_replicas
from megatron_jam.training.step import ForwardBackward
from megatron_jam.training.zero_setup import import_deepspeed
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import gather_whole
from tests.helpers.pico import LLAMA, pico_config, pico_folder, pico_tokenizer, pico_vocabulary

LAYOUTS = {
    "one": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(tensor=2), 1),
    "pp2": (ParallelConfig(pipeline=2), 1),
    "dp2": (ParallelConfig(), 2),
    "tp2-sp": (ParallelConfig(tensor=2, sequence=True), 1),
    "pp2-dp2": (ParallelConfig(pipeline=2), 2),
    "tp2-pp2": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1),
}
"""Layout and replicas."""

STEPS, HALF = 4, 2
"""Steps of a run, and after how many some are stopped."""

CHAMELEON = dataclasses.replace(
    pico_config("cross", num_layers=2, **LLAMA, qk_norm=True), tied=False
)
PLAIN = {"num_layers": 2, "affine_norm": True, "activation": "gelu", "bias": True}
SEPARATE = pico_config("separate", **PLAIN)


def run_material(root: Path) -> tuple[Path, Path]:
    """JAM-Crosses in fp32 (weights, chameleon, separate; late has its only bridge behind the last
    layer), a set of random documents and a small one for validation."""
    config = pico_config("cross", **PLAIN)
    pico_folder(root / "chameleon", CHAMELEON, dtype=torch.float32)
    pico_folder(root / "separate", SEPARATE, dtype=torch.float32)
    late = dataclasses.replace(SEPARATE, bridges=BridgeConfig(layers=[1]))
    pico_folder(root / "late", late, dtype=torch.float32)
    weights = pico_folder(root / "weights", config, dtype=torch.float32)
    _write_random_set(root / "set", 50)
    _write_random_set(root / "held_out", 5)
    return weights, root / "set"


def _write_random_set(prefix: Path, size: int) -> None:
    vocabulary = pico_vocabulary()
    rng = np.random.default_rng(0)
    documents = [
        np.append(rng.integers(4, 300, size=rng.integers(5, 40)), vocabulary.eos)
        for _ in range(size)
    ]
    write_set(
        prefix,
        documents,
        vocabulary=vocabulary,
        tokenizer_sha256=pico_tokenizer().sha256,
        kind="text",
    )


def settings(
    material: tuple[Path, Path], output: Path, parallel: ParallelConfig, **changes: Any
) -> dict[str, Any]:
    """A run of a few steps."""
    weights, prefix = material
    sets = [DataSetConfig(name="set", path=str(prefix))]
    held_out = [DataSetConfig(name="held_out", path=str(prefix.with_name("held_out")))]
    return {
        "weights": weights,
        "output": output,
        "data": DataConfig(sets=sets, objective="cm3", cm3=Cm3Config(mean_spans=1.0)),
        "validation": held_out,
        "steps": STEPS,
        "context_length": 32,
        "global_batch_size": 2,
        "parallel": parallel,
        "log_every": 1,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=1, epsilon=1e-4),
        **changes,
    }


def run_training(world: World, values: dict[str, Any], wants_moments: bool = False) -> Any:
    """Run, and compare copies of weights at the end; `moments` if wanted."""
    training = build_training(world, values)
    training.run()
    if training.config.dropout:
        check_replicas(training.chunks, world)  # copies of a weight have learnt the same
    return moments(training, world) if wants_moments else None


def build_training(
    world: World, values: dict[str, Any], callbacks: Sequence[Callback] = ()
) -> Training:
    """A run as the entry point would make it."""
    config = RunConfig(**values)
    folder = WeightsFolder(config.weights)

    def validate(step: ForwardBackward, poll: Callable[[], None]) -> Mapping[str, Losses]:
        return measure_sets(
            step, config.validation, folder, world, context_length=32, micro_batch_size=4, poll=poll
        )

    return Training(config, folder, world, validate, callbacks)


def forget_worlds(world: World) -> None:
    """Have DeepSpeed, which remembers groups of worlds before, begin anew."""
    package = import_deepspeed(world.device)
    package.comm.comm.cdb = None
    groups = package.utils.groups
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups.mesh_device = None


def moments(training: Training, world: World) -> dict[str, torch.Tensor]:
    """First and second moments, whole, by logical name on rank 0; of one stage and replica."""
    (optimizer,) = training.engine.optimizer.chained_optimizers
    result: dict[str, torch.Tensor] = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        local: dict[str, torch.Tensor] = {}
        for holder in holders(training.chunks[0]):
            group, index = optimizer.model_param_group_index_map[holder.parameter]
            shard = optimizer.optimizer.param_groups[group]["params"][index]
            state = optimizer.optimizer.state[shard][kind].view(holder.parameter.shape)
            local.update(unpack(state, holder.parts))
        table = parameter_table(training.folder.config)
        for name, whole in gather_whole(table, local, world, torch.float32):
            if whole is not None:
                result[f"{kind}.{name}"] = whole
    return result


def losses(output: Path) -> list[float]:
    """Training losses of a run, by step."""
    lines = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    folder = WeightsFolder(output / "weights")
    return {name: folder.read(name) for name in folder.names}
