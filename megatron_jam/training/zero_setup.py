"""DeepSpeed as a package, its settings for a run, and the groups of weights that it is given."""

import importlib
import logging
import os
from typing import Any

import torch
from torch import nn

from megatron_jam.config.errors import UsageError
from megatron_jam.config.run import OptimizerConfig, RunConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import part_of_model
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.world import World
from megatron_jam.training.optimizer import check_factors


def import_deepspeed(device: torch.device) -> Any:
    """The package, told which device it is to find.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # it wants one, also of a rank without torchrun
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UsageError(
            "engine is deepspeed, which cannot be imported: pip install -e '.[deepspeed]', or set"
            f" engine to megatron ({error})"
        ) from error
    # It says what it does in hundreds of lines; its warnings stay.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its own exchange between processes of a host, which it would compile at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_settings(config: RunConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's own settings for a run."""
    is_cuda = world.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.deepspeed.stage,
        "overlap_comm": is_cuda,
        "stage3_param_persistence_threshold": config.deepspeed.keep_whole_below,
    }
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": is_cuda}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches(world.size),
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        # As the other engine: gradients are summed in fp32, over micro-batches and over ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # torch's AdamW, which is fused on both devices; DeepSpeed would compile its own.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
    }


def weight_groups(model: JamModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The weights that learn, by the part of the model that they belong to, whose gradient's norm
    DeepSpeed then measures by itself; by their decay (vectors have none); and by their learning
    rate's factor."""
    factors = config.factors.changed()
    check_factors(factors, model.model_config)
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for holder in holders(model):
        weight = holder.parameter
        if weight.requires_grad:
            decay = config.weight_decay if weight.dim() > 1 else 0.0
            groups.setdefault((part_of_model(holder.parts[0]), decay), []).append(weight)
    return [
        {"params": held, "part": part, "weight_decay": decay, "lr_mult": factors.get(part, 1.0)}
        for (part, decay), held in groups.items()
    ]
