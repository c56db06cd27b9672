"""Training steps of this project's models on random tokens, as a run makes them."""

import torch
from torch import Tensor

from benchmarks.timing import Run
from megatron_jam.config.model import BridgeConfig, ModelConfig, TowerConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.step import ForwardBackward, train_step

RATE = 1e-4


def tower_config(tower: TowerConfig, *, vocabulary: int, length: int) -> ModelConfig:
    """A model of one tower."""
    return ModelConfig(towers={"main": tower}, vocab_size=vocabulary, max_positions=length)


def cross_config(tower: TowerConfig, *, vocabulary: int, length: int) -> ModelConfig:
    """A JAM-Cross of two such towers with a bridge behind every second layer."""
    return ModelConfig(
        towers={"image": tower, "text": tower},
        vocab_size=vocabulary,
        max_positions=length,
        bridges=BridgeConfig(every=2),
    )


def random_tokens(vocabulary: int, *, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 [B, S] each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, vocabulary, (batch, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def our_step(
    config: ModelConfig, world: World, *, batch: int, dtype: torch.dtype = torch.float32
) -> Run:
    """A call is one step of `megatron_jam.train`: gradients, clipping, AdamW."""
    model = JamModel(config, world, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    wrapped = wrap_chunks([model], world)
    optimizer = build_optimizer(wrapped, OptimizerConfig(learning_rate=RATE))
    vocabulary = JointVocabulary.build(
        text_size=config.vocab_size - 20, num_image_codes=2, num_sentinels=16
    )
    step = ForwardBackward(wrapped, world, vocabulary)
    tokens, labels = random_tokens(config.vocab_size, batch=batch, length=config.max_positions)
    one = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(tokens.shape),
        "positions": torch.arange(tokens.shape[1]).repeat(batch, 1),
    }
    return lambda: train_step(step, optimizer, [one], RATE)
