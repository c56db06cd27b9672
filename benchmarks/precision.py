"""What bf16 gives on this CPU: a parent's training step, and attention by itself, over fp32.

Both take turns in one process on one thread; a ratio above 1 says that bf16 is faster.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.models import our_step, tower_config
from benchmarks.timing import speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import start_world, stop_world

# The quickstart's parents: examples/quickstart/configs/tower.yaml and image.yaml.
TOWER = TowerConfig(num_layers=4, hidden_size=256, num_heads=4)
BATCH, LENGTH, VOCABULARY = 12, 168, 4_628


def main(*, pairs: int = 15, json: bool = False) -> None:
    """Print the speed of bf16 over fp32: median and range of the ratios of alternating runs.

    Args:
        pairs: how often each is run.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    if pairs < 1:
        raise UsageError(f"pairs is {pairs}; it must be at least 1")
    torch.set_num_threads(1)
    world = start_world(ParallelConfig())
    config = tower_config(TOWER, vocabulary=VOCABULARY, length=LENGTH)
    half, single = (
        our_step(config, world, batch=BATCH, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    name = "bf16's speed over fp32: a training step of a parent"
    speed_over(name, half, single, pairs=pairs).print(as_json=json)
    half, single = attention_of(torch.bfloat16), attention_of(torch.float32)
    name = "bf16's speed over fp32: attention alone, forward and gradient"
    speed_over(name, half, single, pairs=pairs).print(as_json=json)
    stop_world()


def attention_of(dtype: torch.dtype) -> Callable[[], object]:
    """torch's causal attention and its gradient, in the shapes of that step."""
    shape = (BATCH, TOWER.num_heads, LENGTH, TOWER.head_size)
    heads = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape).to(dtype)

    def run() -> object:
        out = F.scaled_dot_product_attention(*heads, is_causal=True)
        return torch.autograd.grad(out, heads, grad)

    return run


if __name__ == "__main__":
    run_command(main)
