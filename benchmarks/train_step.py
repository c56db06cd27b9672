"""A training step of a tower over those of Megatron-Core and transformers, and of JAM-Cross over
what its FLOPs make of a tower's.

Width 512, 4 layers, ReLU, biases, fp32; forward, backward, clipping and AdamW, in turns in one
process on one thread.
"""

import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from benchmarks.models import RATE, cross_config, our_step, random_tokens, tower_config
from benchmarks.timing import Run, row, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import TowerConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.parallel.world import World, start_world, stop_world
from megatron_jam.planning.flops import model_flops

CASES = {"a": (2, 512, 16_384), "b": (1, 2_048, 4_096)}
"""Batch, sequence length, vocabulary."""

WIDTH, LAYERS, HEADS = 512, 4, 8
CLIP_NORM = 1.0
OPT = TowerConfig(
    num_layers=LAYERS, hidden_size=WIDTH, num_heads=HEADS, bias=True, affine_norm=True
)


def main(*, pairs: int = 9, json: bool = False, only: str = "") -> None:
    """Print a ratio a line, above 1 where this project is faster (of JAM-Cross: its overhead).

    Args:
        pairs: how often each is run.
        json: one line of JSON a row (name, ratio, spread) in place of text.
        only: rows whose name has these words.
    """
    if pairs < 1:
        raise UsageError(f"pairs is {pairs}; it must be at least 1")
    torch.set_num_threads(1)
    world = start_world(ParallelConfig())
    for case, (batch, length, vocabulary) in CASES.items():
        where = f"({case}: {batch} x {length} tokens, vocabulary {vocabulary})"
        sizes = {"vocabulary": vocabulary, "length": length}
        name = f"tower's speed over Megatron-Core's GPTModel {where}"
        if only in name:
            ours = our_step(tower_config(OPT, **sizes), world, batch=batch)
            peer = megatron_step(world, batch=batch, **sizes)
            speed_over(name, ours, peer, pairs=pairs).print(as_json=json)
        name = f"tower's speed over transformers' OPTForCausalLM {where}"
        if only in name:
            ours = our_step(tower_config(OPT, **sizes), world, batch=batch)
            peer = opt_step(batch=batch, **sizes)
            speed_over(name, ours, peer, pairs=pairs).print(as_json=json)
        name = f"JAM-Cross's time over its FLOPs' worth of a tower's {where}"
        if only in name:
            cross(name, world, batch, pairs, json, **sizes)
    stop_world()


def cross(
    name: str, world: World, batch: int, pairs: int, json: bool, *, vocabulary: int, length: int
) -> None:
    """Print (cross's seconds / its FLOPs) / (tower's seconds / its FLOPs)."""
    configs = [
        make(OPT, vocabulary=vocabulary, length=length) for make in (tower_config, cross_config)
    ]
    one, two = (our_step(config, world, batch=batch) for config in configs)
    work = [model_flops(config, context_length=length).training for config in configs]
    found = speed_over(name, one, two, pairs=pairs)  # seconds of two over seconds of one
    scale = work[0] / work[1]
    ratios = [found.ratio * scale, *(each * scale for each in found.spread)]
    row(name, sorted(ratios)).print(as_json=json)


def megatron_step(world: World, *, batch: int, vocabulary: int, length: int) -> Run:
    """Megatron-Core's own model from its local spec, with torch's fused AdamW."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        activation_func=F.relu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=vocabulary,
        max_sequence_length=length,
        share_embeddings_and_output_weights=True,
        pg_collection=world.groups,
    )
    tokens, labels = random_tokens(vocabulary, batch=batch, length=length)
    positions = torch.arange(length).repeat(batch, 1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, positions, mask, labels=labels).mean().backward()
        clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()

    return step


def opt_step(*, batch: int, vocabulary: int, length: int) -> Run:
    """transformers' OPT with its fastest attention, with torch's fused AdamW."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        dropout=0.0,
        attn_implementation="sdpa",
    )
    model = OPTForCausalLM(config)
    model.train()
    tokens, labels = random_tokens(vocabulary, batch=batch, length=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(input_ids=tokens).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()

    return step


if __name__ == "__main__":
    run_command(main)
