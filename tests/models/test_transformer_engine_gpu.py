"""What stand-ins cannot show: Transformer Engine's own layers, on one GPU."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.config.run import OptimizerConfig
from megatron_jam.parallel.fused import find_transformer_engine
from megatron_jam.parallel.world import World, start_world, stop_world
from megatron_jam.training.optimizer import build_optimizer, wrap_chunks
from megatron_jam.training.step import ForwardBackward, train_step
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.runs import (
    build,
    loss_and_gradients,
    random_batch,
    split_batch,
    whole_logits,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        bool(find_transformer_engine().missing), reason="Transformer Engine is missing"
    ),
]

OPT = {"bias": True, "affine_norm": True}
WIDE: dict[str, Any] = {"num_layers": 2, "hidden_size": 256, "num_heads": 4}
"""Heads of 64: fused attention takes no odd ones, and FP8 multiples of 128."""

CONFIGS: dict[str, ModelConfig] = {
    "cm3leon": pico_config("tower", **WIDE),
    "opt": pico_config("tower", **WIDE, **OPT),
    "llama": pico_config("tower", **{**LLAMA, **WIDE, "num_kv_heads": 2, "ffn_size": 512}),
    "chameleon": pico_config("tower", **{**LLAMA, **WIDE, "num_kv_heads": 2}, qk_norm=True),
    "cross": pico_config("cross", **WIDE, **OPT, activation="gelu"),
}
ENGINE = {"backend": "transformer_engine"}
LENGTH = 64


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One rank on the GPU."""
    yield start_world(ParallelConfig())
    stop_world()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights small enough that bf16 holds what they make."""
    root = tmp_path_factory.mktemp("engine")
    paths = {}
    for name, config in CONFIGS.items():
        paths[name] = pico_folder(root / name, config, dtype=torch.bfloat16, scale=0.05)
    return paths


def batch_of(path: Path) -> dict[str, Tensor]:
    """Four samples of 64 tokens, on the CPU."""
    return random_batch(WeightsFolder(path).config.vocab_size, samples=4, length=LENGTH)


def apart(one: Tensor, other: Tensor) -> float:
    """||a - b|| / ||a||."""
    return float((other.float() - one.float()).norm() / one.float().norm())


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_torchs_layers(
    kind: str, world: World, folders: dict[str, Path]
) -> None:
    """No farther from fp32 than a few times what torch's own layers in bf16 are."""
    path = folders[kind]
    tokens = batch_of(path)["tokens"]
    exact = whole_logits(world, path, tokens, torch.float32)
    plain = whole_logits(world, path, tokens, torch.bfloat16)
    fused = whole_logits(world, path, tokens, torch.bfloat16, **ENGINE)
    assert 0 < apart(exact, plain) < 0.05
    assert apart(exact, fused) < max(3 * apart(exact, plain), 0.01)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_torchs_layers(
    kind: str, recompute: str, world: World, folders: dict[str, Path]
) -> None:
    path = folders[kind]
    run = (world, path, batch_of(path))
    exact, plain, fused = (
        loss_and_gradients(*run, dtype, recompute, **settings)
        for dtype, settings in (
            (torch.float32, {}),
            (torch.bfloat16, {}),
            (torch.bfloat16, ENGINE),
        )
    )
    assert fused[0] == pytest.approx(exact[0], rel=1e-2)
    whole = torch.stack([gradient.norm() for gradient in exact[1].values()]).norm()
    for name, gradient in exact[1].items():
        size = gradient.norm() + 1e-2 * whole
        errors = [float((x[1][name] - gradient).norm() / size) for x in (plain, fused)]
        assert errors[1] < max(3 * errors[0], 0.03), name


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_token_sees_a_later_one(kind: str, world: World, folders: dict[str, Path]) -> None:
    """Through towers and through causal bridges, at each of four places."""
    (model,) = build(WeightsFolder(folders[kind]), world, torch.bfloat16, **ENGINE)
    tokens = batch_of(folders[kind])["tokens"][:1].to(world.device)
    positions = torch.arange(LENGTH, device=world.device)[None]
    before = model(tokens, positions)
    for place in (1, 17, 40, LENGTH - 1):
        changed = tokens.clone()
        changed[:, place:] = (changed[:, place:] + 7) % 300
        after = model(changed, positions)
        assert apart(before[:place], after[:place]) < 1e-3
        assert apart(before[place:], after[place:]) > 1e-2


@torch.no_grad()
def test_isolated_documents_do_not_see_one_another(world: World, folders: dict[str, Path]) -> None:
    (model,) = build(WeightsFolder(folders["cross"]), world, torch.bfloat16, **ENGINE)
    tokens = batch_of(folders["cross"])["tokens"][:1].to(world.device)
    places = torch.arange(LENGTH, device=world.device)[None]
    documents = (places >= 24).long()
    both = model(tokens, places - 24 * documents, documents=documents)
    alone = model(tokens[:, 24:], places[:, :-24])
    assert apart(alone, both[24:]) < 0.02


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_steps_are_finite_and_learn(
    fp8: str, recompute: str, world: World, folders: dict[str, Path]
) -> None:
    """Each step must see the weights of the last: cached ones in FP8 would learn nothing."""
    from transformer_engine.pytorch import fp8 as support

    checks = {"blockwise": "check_fp8_block_scaling_support", "mxfp8": "check_mxfp8_support"}
    supported, reason = getattr(support, checks.get(fp8, "check_fp8_support"))()
    if not supported:
        pytest.skip(reason)
    path = folders["cross"]
    folder = WeightsFolder(path)
    chunks = build(folder, world, torch.bfloat16, recompute=recompute, fp8=fp8, **ENGINE)
    wrapped = wrap_chunks(chunks, world)
    settings = OptimizerConfig(learning_rate=1e-3)
    optimizer = build_optimizer(wrapped, settings)
    step = ForwardBackward(wrapped, world, folder.vocabulary)
    batches = split_batch(batch_of(path), world, 2)
    steps = [train_step(step, optimizer, batches, settings.learning_rate) for _ in range(12)]
    seen = [each.losses.mean for each in steps]
    assert all(math.isfinite(loss) for loss in seen)
    assert all(each.grad_norm > 0 for each in steps)
    assert len(set(seen)) == len(seen)
    assert seen[-1] < 0.9 * seen[0]
    with torch.no_grad():
        plain = build(folder, world, torch.bfloat16, **ENGINE)
        first = ForwardBackward(plain, world, folder.vocabulary)(batches, forward_only=True)
    assert seen[0] == pytest.approx(first.mean, rel=0.02)


def test_its_fused_adam_is_taken_and_learns(world: World, folders: dict[str, Path]) -> None:
    """Megatron takes Transformer Engine's Adam where it is installed."""
    from megatron.core import optimizer as engine

    assert engine.Adam.__module__.startswith("transformer_engine")
    folder = WeightsFolder(folders["opt"])
    wrapped = wrap_chunks(build(folder, world, torch.bfloat16, **ENGINE), world)
    optimizer = build_optimizer(wrapped, OptimizerConfig())
    step = ForwardBackward(wrapped, world, folder.vocabulary)
    batches = split_batch(batch_of(folder.path), world, 4)
    before = step(batches, forward_only=True).mean
    train_step(step, optimizer, batches, 1e-3)
    assert step(batches, forward_only=True).mean < before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["llama", "cross"])
def test_two_gpus_that_share_sequences_agree_with_one(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_file(batch_of(folders[kind]), tmp_path / "batch")
    results = []
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += ["-m", "tests.helpers.engine_ranks", str(folders[kind])]
        command += [str(tmp_path / "batch"), str(tmp_path / str(ranks)), str(ranks)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=240)
        results.append(load_file(tmp_path / str(ranks)))
    one, two = results
    assert float(two.pop("loss")) == pytest.approx(float(one.pop("loss")), rel=1e-3)
    whole = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    for name, gradient in one.items():
        assert float((two[name] - gradient).norm() / (gradient.norm() + 1e-2 * whole)) < 0.03, name
