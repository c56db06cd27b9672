"""What bf16 gives on this CPU: a parent's training step, and attention by itself, over fp32.

Both take turns in one process on one thread; a ratio above 1 says that bf16 is faster.
"""

import statistics
import time
from collections.abc import Callable
from json import dumps

import torch
from torch.nn import functional as F

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig, TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.world import World, start_world, stop_world
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.step import ForwardBackward, train_step

# The quickstart's parents: examples/quickstart/configs/tower.yaml and image.yaml.
TOWER = TowerConfig(num_layers=4, hidden_size=256, num_heads=4)
BATCH, LENGTH = 12, 168
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY = JointVocabulary.build(text_size=4096, num_image_codes=512, num_sentinels=16)


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
    cases = {
        "training step of a parent": [step_of(world, dtype) for dtype in DTYPES],
        "attention alone, forward and gradient": [attention_of(dtype) for dtype in DTYPES],
    }
    for name, (single, half) in cases.items():
        ratios = [seconds(single) / seconds(half) for _ in range(pairs + 2)][2:]
        spread = [round(min(ratios), 2), round(max(ratios), 2)]
        row = {"name": name, "ratio": round(statistics.median(ratios), 2), "spread": spread}
        print(dumps(row) if json else f"{name}: bf16 {row['ratio']} times fp32's speed {spread}")
    stop_world()


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step_of(world: World, dtype: torch.dtype) -> Callable[[], object]:
    """A training step of a tower with random weights on random tokens."""
    config = ModelConfig(
        towers={"main": TOWER}, vocab_size=VOCABULARY.size, max_positions=256, init_std=0.02
    )
    model = JamModel(config, world, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, config.init_std, generator=generator)
    wrapped = wrap_chunks([model], world)
    optimizer = build_optimizer(wrapped, OptimizerConfig(learning_rate=1e-4))
    step = ForwardBackward(wrapped, world, VOCABULARY)
    tokens = torch.randint(4, VOCABULARY.size, (BATCH, LENGTH + 1), generator=generator)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(BATCH, LENGTH),
        "positions": torch.arange(LENGTH).repeat(BATCH, 1),
    }
    return lambda: train_step(step, optimizer, [batch], 1e-4)


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
