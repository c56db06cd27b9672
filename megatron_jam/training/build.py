"""What a run is made of: whether its settings fit each other, and the model with its weights."""

import dataclasses
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_not_read
from megatron_jam.config.run import RunConfig
from megatron_jam.data.indexed import read_info
from megatron_jam.data.loader import image_tokenizer_of
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import learns, parameter_table
from megatron_jam.models.sharding import freeze
from megatron_jam.parallel.device import DTYPES
from megatron_jam.parallel.world import World
from megatron_jam.training.engine import Engine, MegatronEngine
from megatron_jam.training.zero import ZeroEngine
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import load_weights


def check_run(config: RunConfig, folder: WeightsFolder, world: World) -> None:
    """Raise UsageError unless settings, weights, tokenizers and data fit each other."""
    check_not_read(config.output / "weights", folder.path)
    model = folder.config
    if config.context_length > model.max_positions:
        raise UsageError(
            f"context_length {config.context_length} is longer than the model's max_positions"
            f" {model.max_positions}"
        )
    if config.freeze and not model.is_pair:
        raise UsageError(f"freeze is {config.freeze}, but the model has one tower alone")
    if not any(learns(entry, config.freeze) for entry in parameter_table(model)):
        raise UsageError(f"freeze is {config.freeze}, which leaves nothing to train")
    config.parallel.check_micro_batches(config.num_micro_batches(world.size))
    for each in config.data.sets:
        folder.require_tokenizer(read_info(each.path).tokenizer_sha256, each.path)
    images, known = image_tokenizer_of(config.data), folder.image_tokenizer_sha256
    if images and known and images != known:
        raise UsageError(
            f"the pictures of data.sets were encoded with another image tokenizer than those"
            f" that {folder.path} was trained on; prepare them with that one"
        )


def build_chunks(config: RunConfig, folder: WeightsFolder, world: World) -> list[JamModel]:
    """This rank's chunks of the model with the folder's weights, frozen as `config` says."""
    chunks = [
        JamModel(
            folder.config,
            world,
            dtype=DTYPES[config.precision],
            recompute=config.recompute,
            dropout=config.dropout,
            backend=config.backend,
            fp8=config.fp8,
            z_loss=config.loss.z,
            main_gradients=config.engine == "megatron",
            chunk=chunk,
        )
        for chunk in range(config.parallel.interleave)
    ]
    load_weights(chunks, folder, world)
    for chunk in chunks:
        freeze(chunk, config.freeze)
    return chunks


def build_engine(config: RunConfig, folder: WeightsFolder, world: World) -> Engine:
    """The engine that `config` names, with the folder's model.

    Raises:
        UsageError: it is not installed, or a setting is for a part that the model lacks.
    """
    kind = {"megatron": MegatronEngine, "deepspeed": ZeroEngine}[config.engine]
    return kind(build_chunks(config, folder, world), config, world, folder.vocabulary)


def identity(config: RunConfig, folder: WeightsFolder) -> dict[str, Any]:
    """What makes a run's step n the same step n: its data, their order, and where it began."""
    return {
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "context_length": config.context_length,
        "data": dataclasses.asdict(config.data),
        "vocabulary": folder.vocabulary.sha256,
        "weights": folder.sha256,
        "dropout": config.dropout,
        "freeze": sorted(config.freeze),
        "factors": config.optimizer.factors.changed(),  # the optimizer's state is grouped by them
    }
