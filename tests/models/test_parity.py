"""The same loss and gradients under every layout (DESIGN rule 1), and as the plain reference."""

import dataclasses
from collections.abc import Callable, Container
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import BridgeConfig, ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.fusion.fuse import fuse
from megatron_jam.parallel.cpu import _WeightGradients
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance, loss_and_gradients, random_batch, train_steps

COMBINED = "tp2-pp2-sp-recompute"
"""A layout for every model: what splits or repeats a model, at once."""

LAYOUTS = {
    "tp2": (ParallelConfig(tensor=2), 1, "none"),
    "tp4": (ParallelConfig(tensor=4), 1, "none"),
    "tp2-sp": (ParallelConfig(tensor=2, sequence=True), 1, "none"),
    "pp2": (ParallelConfig(pipeline=2), 1, "none"),
    "pp4": (ParallelConfig(pipeline=4), 1, "none"),
    "pp2-interleaved": (ParallelConfig(pipeline=2, interleave=2), 1, "none"),
    "dp2": (ParallelConfig(), 2, "none"),
    "recompute": (ParallelConfig(), 1, "full"),
    "selective": (ParallelConfig(tensor=2), 1, "selective"),
    "tp2-pp2-sp": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1, "none"),
    COMBINED: (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1, "full"),
    "tp2-dp2": (ParallelConfig(tensor=2), 2, "none"),
    "pp2-dp2": (ParallelConfig(pipeline=2), 2, "none"),
    "tp4-pp2-sp": (ParallelConfig(tensor=4, pipeline=2, sequence=True), 1, "selective"),
    "tp2-pp2-dp2-sp-recompute": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 2, "full"),
    "tp2-pp2-interleaved-dp2": (ParallelConfig(tensor=2, pipeline=2, interleave=2), 2, "none"),
}
"""Layout, replicas, recomputation."""

COMMON = ("pp2", "dp2", COMBINED, "pp2-dp2", "tp2-pp2-interleaved-dp2")
"""Layouts whose optimizer steps are compared by default."""

ADDED_APART = partial(loss_and_gradients, main_gradients=False)
"""Weight gradients that are not added to their sums within the product."""

SAMPLES, LENGTH = 4, 16
EVERYWHERE = ["opt", "llama", "width", "cross", "unequal"]
"""Models for every layout; of all but the cross some layouts by default, which have all that splits
or repeats a model."""

FULL = (COMBINED, "tp4-pp2-sp", "tp2-pp2-interleaved-dp2")
"""Those."""


def unless_slow(kind: str, layout: str, *, by_default: Container[str]) -> Any:
    """A case that runs by default if its model is "cross", or its layout is listed."""
    is_default = kind == "cross" or layout in by_default
    return pytest.param(kind, layout, marks=[] if is_default else pytest.mark.slow)


PER_TOWER = {"tables": "per_tower", "text_ids": [0, 300]}
WIDE = {"head": "wide", "text_ids": [0, 300]}


def one_way(config: ModelConfig) -> ModelConfig:
    """Bridges into the text tower alone, behind layers 1 and 2, with a norm on what they read."""
    bridges = BridgeConfig(layers=[1, 2], into="text", kv_norm=True)
    return dataclasses.replace(config, bridges=bridges)


def unequal(**settings: Any) -> ModelConfig:
    """An image tower of 3 narrower layers with grouped queries beside a text tower of 4."""
    config = pico_config("cross", affine_norm=True, bias=True, activation="gelu")
    image = {"num_layers": 3, "hidden_size": 24, "num_kv_heads": 4, "ffn_size": 40, "norm": "rms"}
    towers = {"image": dataclasses.replace(config.towers["image"], **image)}
    towers["text"] = dataclasses.replace(config.towers["text"], num_heads=8)
    config = dataclasses.replace(config, towers=towers, **settings)
    return dataclasses.replace(config, bridges=BridgeConfig(every=2, kv_norm=True))


def configs() -> dict[str, ModelConfig]:
    """Pico models of every kind."""
    cross = pico_config("cross", bias=True)
    return {
        "cross": pico_config("cross", bias=True, affine_norm=True, activation="gelu"),
        "unequal": unequal(),
        "opt": pico_config("tower", bias=True, affine_norm=True, activation="gelu"),
        "cm3leon": pico_config("tower"),
        "separate": pico_config("separate", bias=True, affine_norm=True, activation="gelu"),
        "llama": pico_config("tower", **LLAMA),
        "grouped-norms": pico_config("tower", bias=True, affine_norm=True, norm_groups=2),
        "grouped-rms": pico_config("cross", **LLAMA, norm_groups=4),
        "chameleon": pico_config("cross", **LLAMA, qk_norm=True),
        "into-image": dataclasses.replace(
            cross, bridges=BridgeConfig(every=4, into="image", start="random")
        ),
        "into-text": one_way(pico_config("cross", affine_norm=True)),
        "untied": dataclasses.replace(pico_config("separate", bias=True), tied=False),
        "shared-wide": dataclasses.replace(cross, **WIDE),
        "own-projected": dataclasses.replace(cross, **PER_TOWER, tied=False),
        "unequal-wide": unequal(**WIDE, alignment=[0, 2, 3]),
        "unequal-own": unequal(**PER_TOWER),
        "unequal-separate": unequal(**PER_TOWER, head="wide"),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their weights folders, and a JAM-Width of two towers."""
    root = tmp_path_factory.mktemp("parity")
    paths = {name: pico_folder(root / name, config) for name, config in configs().items()}
    half = pico_config("tower", hidden_size=16, num_heads=2, activation="gelu")
    text, image = (pico_folder(root / str(seed), half, seed=seed) for seed in (1, 2))
    fuse(FusionRecipe(method="width", text=text, image=image, output=root / "width"))
    return {**paths, "width": root / "width"}


@pytest.fixture(scope="module")
def single(pool: WorkerPool, folders: dict[str, Path]) -> dict:
    """Loss and gradients of one rank in float64."""
    return {
        name: pool.run(loss_and_gradients, ParallelConfig(), path, batch_of(path), torch.float64)[0]
        for name, path in folders.items()
    }


@pytest.fixture(scope="module")
def single_in_fp32(pool: WorkerPool, folders: dict[str, Path]) -> Callable[[str], Any]:
    """The same in fp32, of the models that are asked for."""

    @cache
    def run(kind: str) -> Any:
        path = folders[kind]
        run = (path, batch_of(path), torch.float32)
        return pool.run(ADDED_APART, ParallelConfig(), *run)[0]

    return run


@pytest.fixture(scope="module")
def single_steps(pool: WorkerPool, folders: dict[str, Path]) -> Callable[[str, bool], Any]:
    """Losses and weights of three steps of one rank, of the models that are asked for."""

    @cache
    def run(kind: str, sharded: bool) -> Any:
        steps = (folders[kind], batches_of(folders[kind]), torch.float32, sharded)
        return pool.run(train_steps, ParallelConfig(), *steps)[0]

    return run


def batches_of(path: Path) -> list[dict[str, Tensor]]:
    """Batches of three steps."""
    size = WeightsFolder(path).config.vocab_size
    return [random_batch(size, samples=SAMPLES, length=LENGTH, seed=i) for i in range(3)]


def batch_of(path: Path) -> dict[str, Tensor]:
    """A batch for the model in `path`."""
    size = WeightsFolder(path).config.vocab_size
    return random_batch(size, samples=SAMPLES, length=LENGTH)


@pytest.mark.parametrize("kind", [*configs(), "width"])
def test_one_rank_equals_reference(kind: str, folders: dict[str, Path], single: dict) -> None:
    folder = WeightsFolder(folders[kind])
    weights = {n: folder.read(n).requires_grad_() for n in folder.names}
    batch = batch_of(folders[kind])
    logits = reference_logits(folder.config, weights.__getitem__, batch["tokens"])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
    )
    mask = batch["loss_mask"].flatten()
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    value, gradients = single[kind]
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert distance({n: w.grad for n, w in weights.items()}, gradients) < 1e-7


@pytest.mark.parametrize("kind", [*configs(), "width"])
def test_gradients_reach_every_parameter(kind: str, single: dict) -> None:
    gradients = single[kind][1]
    everything = torch.stack([each.norm() for each in gradients.values()]).norm()
    for name, gradient in gradients.items():
        # What is added to all keys leaves a softmax as it is (unless they are rotated).
        is_idle = name.endswith("attention.k.bias")
        reached = float(gradient.norm() / everything) > 1e-8
        assert reached != is_idle, name


@pytest.mark.parametrize(
    ("kind", "layout"),
    [unless_slow(kind, each, by_default=FULL) for kind in EVERYWHERE for each in LAYOUTS]
    + [(kind, COMBINED) for kind in configs() if kind not in EVERYWHERE],
)
def test_layouts_agree(
    pool: WorkerPool, kind: str, layout: str, folders: dict[str, Path], single: dict
) -> None:
    parallel, data, recompute = LAYOUTS[layout]
    path = folders[kind]
    results = pool.run(
        loss_and_gradients, parallel, path, batch_of(path), torch.float64, recompute, data=data
    )
    loss, gradients = results[0]
    assert loss == pytest.approx(single[kind][0], rel=1e-12)
    assert distance(single[kind][1], gradients) < 1e-7


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(
            kind,
            layout,
            marks=[] if kind == "cross" or layout == FULL[-1] else pytest.mark.slow,
        )
        for kind in ("opt", "cross", "unequal")
        for layout, (_, data, _) in LAYOUTS.items()
        if data > 1
    ],
)
def test_gradients_of_a_distributed_optimizer_agree(
    pool: WorkerPool, kind: str, layout: str, folders: dict[str, Path], single: dict
) -> None:
    parallel, data, recompute = LAYOUTS[layout]
    run = (folders[kind], batch_of(folders[kind]), torch.float64, recompute, 1, True)
    loss, gradients = pool.run(loss_and_gradients, parallel, *run, data=data)[0]
    assert loss == pytest.approx(single[kind][0], rel=1e-12)
    assert distance(single[kind][1], gradients) < 1e-7


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_accumulation_agrees(
    pool: WorkerPool, kind: str, folders: dict[str, Path], single: dict
) -> None:
    """One micro-batch of all samples in place of one for each."""
    path = folders[kind]
    run = (path, batch_of(path), torch.float64, "none", SAMPLES)
    loss, gradients = pool.run(loss_and_gradients, ParallelConfig(), *run)[0]
    assert loss == pytest.approx(single[kind][0], rel=1e-12)
    assert distance(single[kind][1], gradients) < 1e-7


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("cross", each) for each in ("tp2", "pp2", "dp2", "tp2-pp2-sp")]
    + [(each, "tp2-pp2-sp") for each in ("opt", "width", "unequal")],
)
def test_single_precision_agrees(
    pool: WorkerPool,
    kind: str,
    layout: str,
    folders: dict[str, Path],
    single_in_fp32: Callable[[str], Any],
) -> None:
    """fp32 with GELU, as ReLU's kinks flip between layouts; weight gradients added within the
    product as against apart from it, which fp64 knows alone."""
    parallel, data, _ = LAYOUTS[layout]
    path = folders[kind]
    run = (path, batch_of(path), torch.float32)
    base = single_in_fp32(kind)
    other = pool.run(loss_and_gradients, parallel, *run, data=data)[0]
    assert other[0] == pytest.approx(base[0], rel=1e-6)
    assert distance(base[1], other[1]) < 1e-5


def test_bf16_gradients_are_added_to_fp32_sums(pool: WorkerPool, folders: dict[str, Path]) -> None:
    """Within the product, as its kernel's calls tell, and apart from it; those of tables, which
    autograd adds in bf16 first, come closer to fp64's."""
    run = (folders["cross"], batch_of(folders["cross"]), torch.bfloat16)
    apart, calls = pool.run(
        partial(counting_products, main_gradients=False), ParallelConfig(), *run
    )[0]
    assert calls == 0
    within, calls = pool.run(counting_products, ParallelConfig(), *run)[0]
    matrices = [name for name, value in within[1].items() if value.dim() == 2]
    tables = [name for name in matrices if "embedding" in name]
    assert calls >= len(matrices) - len(tables) > 10
    assert within[0] == apart[0]
    exact = pool.run(loss_and_gradients, ParallelConfig(), *run[:2], torch.float64)[0][1]
    for name, value in apart[1].items():
        if "embedding.tokens" in name:
            errors = [(each - exact[name]).norm() for each in (within[1][name], value)]
            assert errors[0] < errors[1] < 0.05 * exact[name].norm(), name
        else:
            assert torch.equal(within[1][name], value), name


def counting_products(world: World, *run: Any, **settings: Any) -> Any:
    """What a run gives, and how often a gradient was added to its sum within a product."""
    plain = _WeightGradients.wgrad_gemm_accum_fp32
    with patch.object(_WeightGradients, "wgrad_gemm_accum_fp32", wraps=plain) as kernel:
        return loss_and_gradients(world, *run, **settings), kernel.call_count


@pytest.mark.parametrize(
    ("kind", "layout", "sharded"),
    [
        pytest.param("cross", each, True, marks=[] if each in COMMON else pytest.mark.slow)
        for each in LAYOUTS
    ]
    + [("cross", each, False) for each in ("pp2-dp2", "tp2-pp2-dp2-sp-recompute")]
    + [pytest.param("cross", "tp2-pp2-sp", False, marks=pytest.mark.slow)]
    + [(each, "tp2-pp2-dp2-sp-recompute", True) for each in ("opt", "llama", "width", "unequal")]
    + [("separate", "pp2-dp2", True), ("unequal", "pp2-dp2", True)],
)
def test_optimizer_steps_agree(
    pool: WorkerPool,
    kind: str,
    layout: str,
    sharded: bool,
    folders: dict[str, Path],
    single_steps: Callable[[str, bool], Any],
) -> None:
    """Three steps with clipping active; Megatron's optimizer knows fp32 at most."""
    parallel, data, _ = LAYOUTS[layout]
    base = single_steps(kind, sharded)
    run = (folders[kind], batches_of(folders[kind]), torch.float32, sharded)
    other = pool.run(train_steps, parallel, *run, data=data)[0]
    assert len(set(base[0])) == 3
    assert other[0] == pytest.approx(base[0], rel=1e-5)
    assert distance(base[1], other[1]) < 1e-5
