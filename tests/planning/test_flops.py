"""FLOPs on paper are those that torch counts, and stages share them out."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_jam.config.model import BridgeConfig, ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.cost import head_flops, layer_flops
from megatron_jam.models.jam import JamModel
from megatron_jam.models.sharding import freeze
from megatron_jam.parallel.world import World
from megatron_jam.planning.flops import model_flops, stage_flops
from megatron_jam.training.optimizer import wrap_chunks
from megatron_jam.training.step import ForwardBackward
from megatron_jam.weights.reference import reference_logits
from tests.helpers.memory import vocabulary_of
from tests.helpers.pico import LLAMA, pico_config, pico_tensors
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import random_batch

CROSS = pico_config("cross")
NARROW = {"image": dataclasses.replace(CROSS.towers["image"], hidden_size=24, num_layers=3)}
MODELS: dict[str, ModelConfig] = {
    "tower": pico_config("tower", bias=True, affine_norm=True),
    "llama": dataclasses.replace(pico_config("tower", **LLAMA), tied=False),
    "cross": CROSS,
    "unequal": dataclasses.replace(CROSS, towers={**CROSS.towers, **NARROW}),
}


def products(model: ModelConfig, length: int) -> int:
    """FLOPs of the matrix products of the plain reference, without those of attention scores."""
    weights: dict[str, Any] = pico_tensors(model)
    tokens = torch.arange(length)[None] % model.vocab_size
    with FlopCounterMode(display=False) as counter:
        reference_logits(model, weights.__getitem__, tokens)
    kinds = counter.get_flop_counts()["Global"]
    return sum(count for kind, count in kinds.items() if "bmm" not in str(kind))


SEPARATE = pico_config("separate")
ONE_WAY = BridgeConfig(layers=[1], into="text", kv_norm=True)
TRAINED: dict[str, tuple[ModelConfig, tuple[str, ...]]] = {
    **{name: (model, ()) for name, model in MODELS.items()},
    "width": (pico_config("tower", hidden_size=64, num_heads=8), ()),
    "separate": (SEPARATE, ()),
    "one way": (dataclasses.replace(SEPARATE, bridges=ONE_WAY, tied=False), ()),
    "chameleon": (pico_config("cross", **LLAMA, qk_norm=True), ()),
    "frozen": (CROSS, ("image",)),
}
"""Models, and their frozen towers."""


def counted(world: World, model: ModelConfig, frozen: tuple[str, ...], length: int) -> int:
    """FLOPs of a training step of two samples by torch's count."""
    chunk = JamModel(model, world)
    freeze(chunk, frozen)
    wrapped = wrap_chunks([chunk], world)
    step = ForwardBackward(wrapped, world, vocabulary_of(model))
    batch = random_batch(model.vocab_size, samples=2, length=length)
    # torch has no formula for products that are added in place, in which the loss sums gradients.
    formulas = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as c:
        step([batch])
    return c.get_total_flops()


@pytest.mark.parametrize("kind", TRAINED)
def test_full_count_of_training_is_torchs(pool: WorkerPool, kind: str) -> None:
    (model, frozen), length = TRAINED[kind], 48
    found = pool.run(counted, ParallelConfig(), model, frozen, length)[0]
    settings: dict[str, Any] = {"context_length": length, "frozen": frozen}
    planned = model_flops(model, attention="full", **settings).training
    assert 2 * length * planned == pytest.approx(found, rel=0.01)
    causal = model_flops(model, **settings).training
    assert causal < 0.97 * planned, "attention is too small a part to be checked"


@pytest.mark.parametrize("kind", MODELS)
def test_matrices_are_those_that_torch_counts(kind: str) -> None:
    model, length = MODELS[kind], 8
    blocks = [
        tower.hidden_size
        for layer in range(model.num_layers)
        for name, tower in model.towers.items()
        for there in (model.tower_layer(name, layer) is not None, name in model.bridges_into(layer))
        if there
    ]
    scores = sum(2 * (length + 1) * width for width in blocks)
    planned = model_flops(model, context_length=length).forward
    assert length * (planned - scores) == products(model, length)


def test_attention_by_hand() -> None:
    """Each of 64 tokens reads 32.5 on average, in two products of width 32."""
    (first, _), *_ = layer_flops(pico_config("tower"), 64)
    assert first == 2 * 12 * 32**2 + 2 * 2 * 32 * 65 // 2


def test_full_attention_by_hand() -> None:
    (first, _), *_ = layer_flops(pico_config("tower"), 64, "full")
    assert first == 2 * 12 * 32**2 + 2 * 2 * 32 * 64


def test_each_output_row_is_read_by_one_tower() -> None:
    assert pico_config("separate").vocab_size == 322
    assert head_flops(pico_config("separate")) == 2 * 322 * 32


def test_training_is_three_times_the_forward_pass() -> None:
    flops = model_flops(CROSS, context_length=64)
    assert flops.training == 3 * (flops.layers + flops.bridges + flops.outside)


@pytest.mark.parametrize("balance", ["layers", "cost"])
def test_stages_make_the_whole(balance: Any) -> None:
    parallel = ParallelConfig(pipeline=2, interleave=2, balance=balance)
    parts = stage_flops(CROSS, parallel, context_length=64)
    whole = model_flops(CROSS, context_length=64)
    assert sum(part.forward for part in parts) == whole.forward
    assert sum(part.bridges for part in parts) == whole.bridges > 0
    assert parts[0].outside == 0 < parts[1].outside
