"""The update, norms of a gradient's parts, learning-rate factors, what overlaps with computing."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import FactorsConfig, OptimizerConfig
from megatron_jam.models.parameters import parameter_table, part_of_model
from megatron_jam.models.sharding import logical_gradients
from megatron_jam.parallel.adam import Adam
from megatron_jam.parallel.world import World
from megatron_jam.training.optimizer import (
    PartNorms,
    build_optimizer,
    finish_weights,
    wrap_chunks,
)
from megatron_jam.training.step import ForwardBackward, train_step
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import gather_whole
from tests.helpers.pico import pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build, loss_and_gradients, random_batch, split_batch
from tests.helpers.training import HALF, losses, run_training, settings, tensors

CLIP, RATE = 0.5, 1e-2


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JAM-Cross in fp32."""
    path = tmp_path_factory.mktemp("optimizer") / "cross"
    return pico_folder(path, pico_config("cross", activation="gelu"), dtype=torch.float32)


def batches(path: Path, count: int) -> list[dict[str, torch.Tensor]]:
    size = WeightsFolder(path).config.vocab_size
    return [random_batch(size, samples=4, length=16, seed=i) for i in range(count)]


def train(
    world: World, path: Path, steps: int, factors: dict[str, float], **wrapping: Any
) -> tuple[list[float], list[dict[str, float]], dict[str, torch.Tensor], int] | None:
    """Norms of some steps, whole and by part, the weights behind them, and buckets of gradients."""
    folder = WeightsFolder(path)
    chunks = build(folder, world, torch.float32)
    wrapped = wrap_chunks(chunks, world, **wrapping)
    config = OptimizerConfig(
        learning_rate=RATE, epsilon=1e-4, clip_norm=CLIP, factors=FactorsConfig(**factors)
    )
    sharded = wrapping.get("distributed_optimizer", True)
    optimizer = build_optimizer(wrapped, config, distributed_optimizer=sharded)
    step = ForwardBackward(wrapped, world, folder.vocabulary)
    part_norms = PartNorms(chunks, optimizer, world)
    made = [
        train_step(step, optimizer, split_batch(each, world, 1), RATE, part_norms)
        for each in batches(path, steps)
    ]
    finish_weights(wrapped)
    local: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        local.update(logical_gradients(chunk, lambda p: p.detach()))
    whole = dict(gather_whole(parameter_table(folder.config), local, world, torch.float32))
    norms = [each.grad_norm for each in made], [dict(each.part_norms) for each in made]
    buckets = sum(len(buffer.buckets) for each in wrapped for buffer in each.buffers)
    return (*norms, whole, buckets) if world.rank == 0 else None


LAYOUTS: dict[str, tuple[ParallelConfig, int, bool]] = {
    "one": (ParallelConfig(), 1, True),
    "unsharded": (ParallelConfig(), 2, False),
    "dp2": (ParallelConfig(), 2, True),
    "tp2-pp2-sp": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1, True),
    "pp2-dp2": (ParallelConfig(pipeline=2), 2, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_of_parts(pool: WorkerPool, layout: str, cross: Path) -> None:
    """Those of the whole gradients, before clipping, under every layout."""
    parallel, data, sharded = LAYOUTS[layout]
    run = (train, parallel, cross, 1, {})
    (norm,), (parts,), *_ = (
        pool.run(*run, data=data)[0]
        if sharded
        else pool.run(unsharded, parallel, cross, data=data)[0]
    )
    _, gradients = pool.run(
        loss_and_gradients, ParallelConfig(), cross, *batches(cross, 1), torch.float32
    )[0]
    squares: dict[str, float] = {}
    for entry in parameter_table(WeightsFolder(cross).config):
        part = part_of_model(entry)
        squares[part] = squares.get(part, 0) + float(gradients[entry.name].norm()) ** 2
    assert set(parts) == {"image", "text", "bridges", "embeddings", "head"} == set(squares)
    assert parts == pytest.approx({name: s**0.5 for name, s in squares.items()}, rel=1e-4)
    assert norm == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-4)
    assert norm > CLIP, "nothing was clipped"


def unsharded(world: World, path: Path) -> Any:
    return train(world, path, 1, {}, distributed_optimizer=False)


def updated(world: World, path: Path, clip_norm: float, optimizer_of_others: bool) -> Any:
    """Weights after a step whose update is nearly the gradient itself; Adam may be another one."""
    folder = WeightsFolder(path)
    chunks = build(folder, world, torch.float32)
    wrapped = wrap_chunks(chunks, world)
    optimizer = build_optimizer(wrapped, dataclasses.replace(LINEAR, clip_norm=clip_norm))
    step = ForwardBackward(wrapped, world, folder.vocabulary)
    (batch,) = batches(path, 1)
    ours = NoAdam if optimizer_of_others else Adam
    with patch("megatron_jam.training.optimizer.Adam", ours):
        train_step(step, optimizer, split_batch(batch, world, 1), RATE)
    local = logical_gradients(chunks[0], lambda p: p.detach())
    return dict(gather_whole(parameter_table(folder.config), local, world, torch.float32))


LINEAR = OptimizerConfig(learning_rate=RATE, epsilon=1.0, weight_decay=0.0)


class NoAdam:
    """No optimizer is one."""


@pytest.mark.parametrize("optimizer_of_others", [False, True], ids=["own", "others"])
@pytest.mark.parametrize("clip_norm", [CLIP, 1e6], ids=["clipped", "whole"])
def test_update_is_that_of_torch(
    pool: WorkerPool, clip_norm: float, optimizer_of_others: bool, cross: Path
) -> None:
    """Divided by the tokens and clipped: torch's AdamW on the mean's clipped gradient."""
    run = (updated, ParallelConfig(), cross, clip_norm, optimizer_of_others)
    found = pool.run(*run)[0]
    _, gradients = pool.run(
        loss_and_gradients, ParallelConfig(), cross, *batches(cross, 1), torch.float32
    )[0]
    folder = WeightsFolder(cross)
    due = {name: torch.nn.Parameter(folder.read(name).clone()) for name in gradients}
    for name, weight in due.items():
        weight.grad = gradients[name]
    norm = torch.nn.utils.clip_grad_norm_(due.values(), clip_norm)
    assert CLIP < norm < 1e6
    betas = (LINEAR.beta1, LINEAR.beta2)
    torch.optim.AdamW(due.values(), lr=RATE, betas=betas, eps=1.0, weight_decay=0).step()
    for name, weight in due.items():
        start = folder.read(name)
        change = weight.detach() - start
        assert float(change.abs().max()) > 0, name
        torch.testing.assert_close(found[name] - start, change, rtol=1e-3, atol=2e-7)


def test_factors_scale_the_updates_of_their_parts(pool: WorkerPool, cross: Path) -> None:
    plain = pool.run(train, ParallelConfig(tensor=2), cross, 1, {})[0][2]
    factors = {"bridges": 0.5, "text": 2.0, "head": 0.25}
    scaled = pool.run(train, ParallelConfig(tensor=2), cross, 1, factors)[0][2]
    folder = WeightsFolder(cross)
    for entry in parameter_table(folder.config):
        start = folder.read(entry.name)
        factor = factors.get(part_of_model(entry), 1.0)
        due = factor * (plain[entry.name] - start)
        assert float(due.abs().max()) > 0
        torch.testing.assert_close(scaled[entry.name] - start, due, rtol=1e-4, atol=1e-6)


def test_a_factor_for_a_part_that_is_not_there(pool: WorkerPool, cross: Path) -> None:
    with pytest.raises(RuntimeError, match=r"optimizer.factors.main is for a part that the model"):
        pool.run(train, ParallelConfig(), cross, 1, {"main": 2.0})


@pytest.mark.parametrize("value", [0, -1, float("inf")])
def test_wrong_factors_are_named(value: float) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.factors\.text"):
        FactorsConfig(text=value)


OVERLAPS = [
    ParallelConfig(overlap_gradients=True),
    ParallelConfig(overlap_gradients=True, overlap_parameters=True),
]


def in_buckets(world: World, path: Path) -> Any:
    return train(world, path, 3, {}, bucket_size=20_000)


@pytest.mark.parametrize("parallel", OVERLAPS, ids=["gradients", "both"])
def test_overlapping_changes_nothing(
    pool: WorkerPool, parallel: ParallelConfig, cross: Path
) -> None:
    norms, parts, weights, buckets = pool.run(train, ParallelConfig(), cross, 3, {}, data=2)[0]
    assert buckets == 1
    found = pool.run(in_buckets, parallel, cross, data=2)[0]
    assert found[3] > 2, "nothing to overlap"
    assert found[0] == pytest.approx(norms, rel=1e-6)
    assert found[1] == [pytest.approx(each, rel=1e-6) for each in parts]
    for name, value in weights.items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-5, atol=1e-6)


def test_a_run_that_overlaps_resumes_bit_for_bit(
    pool: WorkerPool, material: tuple[Path, Path], tmp_path: Path
) -> None:
    """What is saved, validated and exported is the last update, though it is gathered late."""
    plain = settings(material, tmp_path / "plain", ParallelConfig(), validate_every=1)
    pool.run(run_training, ParallelConfig(), plain, data=2)
    parallel = OVERLAPS[1]
    broken = settings(material, tmp_path / "broken", parallel, validate_every=1)
    pool.run(run_training, parallel, {**broken, "stop_at": HALF}, data=2)
    pool.run(run_training, parallel, broken, data=2)
    assert losses(tmp_path / "broken") == losses(tmp_path / "plain")
    one, other = tensors(tmp_path / "plain"), tensors(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap_parameters": True}, "needs parallel.overlap_gradients"),
        ({"overlap_gradients": True, "pipeline": 2}, "needs parallel.pipeline of 1"),
    ],
)
def test_what_cannot_overlap_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ParallelConfig(**values)
