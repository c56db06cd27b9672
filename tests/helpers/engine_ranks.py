"""Loss and gradients under torchrun on GPUs: FOLDER BATCH OUTPUT CONTEXT (see the gpu tests)."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import start_world, stop_world
from tests.helpers.runs import loss_and_gradients


def main(folder: str, batch: str, output: str, context: str) -> None:
    """Write the gradients and the loss of Transformer Engine's layers in bf16 to OUTPUT."""
    world = start_world(ParallelConfig(context=int(context)))
    run = (world, Path(folder), load_file(batch), torch.bfloat16)
    result = loss_and_gradients(*run, backend="transformer_engine")
    if result is not None:
        loss, gradients = result
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in gradients.items()}
        save_file({**tensors, "loss": torch.tensor([loss])}, output)
    stop_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
