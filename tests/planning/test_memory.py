"""Planned memory is what training takes: state counted, activations measured to 10 per cent."""

import dataclasses
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)

from megatron_jam.config.deepspeed import DeepSpeedConfig
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import num_parameters
from megatron_jam.parallel.device import DTYPES
from megatron_jam.planning.memory import Precision, in_flight, plan, state_bytes
from tests.helpers.fake import ranks_of_one_replica
from tests.helpers.memory import peak_of_step
from tests.helpers.pico import LLAMA, pico_config
from tests.helpers.pool import WorkerPool

TOLERANCE = 0.1
SIZES = {
    "wide": {"hidden_size": 192, "num_layers": 3, "vocab_size": 1500, "samples": 2, "length": 160},
    "long": {"hidden_size": 64, "num_layers": 5, "vocab_size": 2400, "samples": 1, "length": 512},
}
"""Not those that the formulas were found with."""


def model(kind: str, size: str) -> ModelConfig:
    """A tower of CM3leon, of Llama or with grouped affine norms, or a JAM-Cross."""
    known = SIZES[size]
    widths = {name: known[name] for name in ("hidden_size", "num_layers")}
    llama = {**LLAMA, "ffn_size": known["hidden_size"] * 5 // 2}
    grouped = {"bias": True, "affine_norm": True, "norm_groups": 2}
    settings = {"llama": llama, "grouped": grouped}.get(kind, {})
    config = pico_config("cross" if kind == "cross" else "tower", **widths, **settings)
    sizes = {"vocab_size": known["vocab_size"], "max_positions": known["length"]}
    return dataclasses.replace(config, tied=kind != "llama", **sizes)


def check(
    pool: WorkerPool,
    config: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    shape: tuple[int, int],
    num_micro_batches: int = 1,
) -> None:
    """Compare plan and measurement of every stage under every recomputation."""
    planned = plan(
        config,
        parallel,
        replicas=1,
        micro_batch_size=shape[0],
        num_micro_batches=num_micro_batches,
        context_length=shape[1],
        precision=precision,
    )
    for recompute in ("none", "selective", "full"):
        run = (config, DTYPES[precision], recompute, shape, num_micro_batches)
        measured = pool.run(peak_of_step, parallel, *run)[:: parallel.tensor]
        due = [stage.activations[recompute] for stage in planned]
        assert due == [pytest.approx(each, rel=TOLERANCE) for each in measured], recompute


@pytest.mark.parametrize(
    ("size", "precision"),
    [
        ("wide", "bf16"),
        ("long", "fp32"),
        pytest.param("wide", "fp32", marks=pytest.mark.slow),
        pytest.param("long", "bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["cm3leon", "llama", "grouped", "cross"])
def test_activations_are_those_measured(
    pool: WorkerPool, kind: str, size: str, precision: Precision
) -> None:
    shape = (SIZES[size]["samples"], SIZES[size]["length"])
    check(pool, model(kind, size), ParallelConfig(), precision, shape)


LAYOUTS = {
    "pp2": ("llama", "wide", ParallelConfig(pipeline=2), 4),
    "pp2-cost": ("cm3leon", "wide", ParallelConfig(pipeline=2, balance="cost"), 3),
    "pp2-interleaved": ("cross", "long", ParallelConfig(pipeline=2, interleave=2), 4),
    "tp2-sp": ("cross", "wide", ParallelConfig(tensor=2, sequence=True), 1),
}
"""Model, its size, layout, micro-batches."""


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(each, marks=[] if each == "pp2-interleaved" else pytest.mark.slow)
        for each in LAYOUTS
    ],
)
def test_activations_of_stages_and_shares_are_those_measured(pool: WorkerPool, layout: str) -> None:
    kind, size, parallel, num_micro_batches = LAYOUTS[layout]
    shape = (SIZES[size]["samples"], SIZES[size]["length"])
    check(pool, model(kind, size), parallel, "bf16", shape, num_micro_batches)


RANKS = [
    ParallelConfig(tensor=2, pipeline=2, balance="cost"),
    ParallelConfig(tensor=4, pipeline=2, interleave=2, sequence=True),
    ParallelConfig(tensor=4),
]
MODELS = {
    "cross": pico_config("cross", num_layers=5, bias=True, affine_norm=True),
    "separate": pico_config("separate", num_layers=5),
    "chameleon": pico_config("cross", num_layers=5, **LLAMA, qk_norm=True),
    "untied": dataclasses.replace(pico_config("tower", num_layers=5, bias=True), tied=False),
}


def sizes_of_ranks(config: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """How many numbers the parameters of each rank have, stage by stage."""
    found = []
    for world in ranks_of_one_replica(parallel, 3 * parallel.tensor * parallel.pipeline):
        chunks = [JamModel(config, world, chunk=i) for i in range(parallel.interleave)]
        found.append(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
    return found


@pytest.mark.parametrize("parallel", RANKS, ids=["tp2-pp2", "tp4-pp2-interleaved", "tp4"])
@pytest.mark.parametrize("kind", MODELS)
def test_parameters_are_those_of_the_ranks(kind: str, parallel: ParallelConfig) -> None:
    config = MODELS[kind]
    stages = plan(
        config,
        parallel,
        replicas=3,
        micro_batch_size=1,
        num_micro_batches=2,
        context_length=32,
        precision="bf16",
    )
    planned = [stage.rank_parameters for stage in stages for _ in range(parallel.tensor)]
    assert planned == sizes_of_ranks(config, parallel)
    assert sum(stage.parameters for stage in stages) == num_parameters(config)
    layers = sorted(layer for stage in stages for layer in stage.layers)
    assert layers == list(range(5))
    assert sum(stage.bridges for stage in stages) == (6 if config.is_pair else 0)


def test_state_in_each_precision() -> None:
    low = state_bytes(100, width=2, replicas=4)
    assert (low.weights, low.gradients, low.optimizer, low.total) == (200, 400, 300, 900)
    exact = state_bytes(100, width=4, replicas=4)
    assert (exact.weights, exact.gradients, exact.optimizer) == (400, 400, 200)
    whole = state_bytes(100, width=2, replicas=4, distributed_optimizer=False)
    assert whole.optimizer == 1200


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4, 8])
def test_one_forward_one_backward(num_micro_batches: int) -> None:
    parallel = ParallelConfig(pipeline=4)
    for stage in range(4):
        waiting = [counts for (counts,) in in_flight(parallel, stage, num_micro_batches)]
        assert max(waiting) == min(num_micro_batches, 4 - stage)


@pytest.mark.parametrize("num_micro_batches", [4, 8, 12])
@pytest.mark.parametrize("interleave", [2, 3])
def test_interleaved_schedule_is_megatrons(interleave: int, num_micro_batches: int) -> None:
    parallel = ParallelConfig(pipeline=4, interleave=interleave)
    table = get_schedule_table(num_micro_batches, interleave, 4)
    for stage in range(4):
        _, _, ahead, _ = get_pp_rank_microbatches(
            num_micro_batches, interleave, 4, p2p_communicator=pipeline_place(4, stage, interleave)
        )
        counts, due = [0] * interleave, []
        for number, (_, chunk) in enumerate(table):
            if number > ahead:
                counts[interleave - 1 - table[number - ahead - 1][1]] -= 1
            counts[chunk] += 1
            due.append(list(counts))
        assert list(in_flight(parallel, stage, num_micro_batches)) == due


def pipeline_place(size: int, rank: int, interleave: int) -> SimpleNamespace:
    """What Megatron's schedule asks of its communicator."""
    group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    return SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=interleave)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (DeepSpeedConfig(stage=2), (2000, 1000, 3000, 0)),
        (DeepSpeedConfig(stage=3), (500, 1000, 3000, 0)),
        (DeepSpeedConfig(stage=2, offload_optimizer=True), (2000, 0, 0, 5500)),
        (DeepSpeedConfig(stage=3, offload_optimizer=True), (500, 0, 0, 5000)),
    ],
)
def test_what_zero_leaves_on_a_rank(zero: DeepSpeedConfig, expected: tuple[int, ...]) -> None:
    """1,000 weights in bf16 on four ranks; gradients, their fp32 copies and moments are fp32."""
    state = state_bytes(1000, width=2, replicas=4, zero=zero)
    assert (state.weights, state.gradients, state.optimizer, state.host) == expected
    assert state.total == sum(expected[:3])
