"""The same loss and gradients under every layout (DESIGN rule 1), and as the plain reference."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_jam.config.model import BridgeConfig, ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import distance, loss_and_gradients, random_batch, train_steps

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
    "tp2-pp2-sp-recompute": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1, "full"),
    "tp2-dp2": (ParallelConfig(tensor=2), 2, "none"),
    "pp2-dp2": (ParallelConfig(pipeline=2), 2, "none"),
}
SAMPLES, LENGTH = 4, 16
KINDS = ["tower", "cross", "affine", "separate", "llama", "chameleon", "untied", "one-way"]


def one_way(config: ModelConfig) -> ModelConfig:
    """Bridges into the text tower alone, behind layers 1 and 2, with a norm on what they read."""
    bridges = BridgeConfig(layers=[1, 2], into="text", kv_norm=True)
    return dataclasses.replace(config, bridges=bridges)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pico models of every kind; `affine` has biases and learnable norms."""
    root = tmp_path_factory.mktemp("parity")
    configs = {
        "tower": pico_config("tower"),
        "cross": pico_config("cross"),
        "separate": pico_config("separate", bias=True, affine_norm=True),
        "affine": pico_config("cross", bias=True, affine_norm=True, activation="gelu"),
        "llama": pico_config("tower", **LLAMA),
        "chameleon": pico_config("cross", **LLAMA, qk_norm=True),
        "one-way": one_way(pico_config("cross", affine_norm=True)),
        "untied": dataclasses.replace(pico_config("separate", bias=True), tied=False),
    }
    return {name: pico_folder(root / name, config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def single(pool: WorkerPool, folders: dict[str, Path]) -> dict:
    """Loss and gradients of one rank in float64."""
    return {
        name: pool.run(loss_and_gradients, ParallelConfig(), path, batch_of(path), torch.float64)[0]
        for name, path in folders.items()
    }


def batch_of(path: Path) -> dict[str, Tensor]:
    """A batch for the model in `path`."""
    size = WeightsFolder(path).config.vocab_size
    return random_batch(size, samples=SAMPLES, length=LENGTH)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "tp2-pp2-sp"])
def test_single_precision_agrees(
    pool: WorkerPool, layout: str, folders: dict[str, Path], single: dict
) -> None:
    """fp32 with GELU; ReLU's kinks flip between layouts in fp32."""
    parallel, data, _ = LAYOUTS[layout]
    path = folders["affine"]
    base = pool.run(loss_and_gradients, ParallelConfig(), path, batch_of(path), torch.float32)[0]
    other = pool.run(loss_and_gradients, parallel, path, batch_of(path), torch.float32, data=data)[
        0
    ]
    assert other[0] == pytest.approx(base[0], rel=1e-6)
    assert distance(base[1], other[1]) < 1e-5


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "tp2-pp2-sp", "tp2-dp2", "pp2-dp2"])
def test_optimizer_steps_agree(
    pool: WorkerPool, layout: str, sharded: bool, folders: dict[str, Path]
) -> None:
    """Three steps with clipping active; Megatron's optimizer knows fp32 at most."""
    path = folders["affine"]
    size = WeightsFolder(path).config.vocab_size
    batches = [random_batch(size, samples=4, length=LENGTH, seed=i) for i in range(3)]
    parallel, data, _ = LAYOUTS[layout]
    base = pool.run(train_steps, ParallelConfig(), path, batches, torch.float32, sharded)[0]
    other = pool.run(train_steps, parallel, path, batches, torch.float32, sharded, data=data)[0]
    assert base[0][2] < base[0][0]
    assert other[0] == pytest.approx(base[0], rel=1e-5)
    assert distance(base[1], other[1]) < 1e-5
