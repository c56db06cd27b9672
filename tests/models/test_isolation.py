"""Isolated documents of one sample know nothing of one another, in towers and through bridges."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.loader import positions_within
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build, distance, loss_and_gradients, random_batch

LENGTHS = (5, 8, 3)
CONFIGS = {
    "cross": pico_config("cross"),
    "chameleon": pico_config("cross", **LLAMA, qk_norm=True),
    "untied": dataclasses.replace(pico_config("separate", bias=True), tied=False),
}


def documents_of(rows: int) -> Tensor:
    """Three documents a row, int64 [rows, 16]."""
    return torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)).expand(rows, -1).contiguous()


@torch.no_grad()
def isolated_logits(world: World, path: Path, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of tokens [B, S] in the documents above."""
    (model,) = build(WeightsFolder(path), world, torch.float64)
    documents = documents_of(len(tokens))
    return model(tokens, positions_within(documents), documents=documents).transpose(0, 1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_document_is_read_as_if_alone(kind: str, tmp_path: Path, pool: WorkerPool) -> None:
    config: ModelConfig = CONFIGS[kind]
    folder = WeightsFolder(pico_folder(tmp_path / kind, config))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (2, sum(LENGTHS)), generator=generator)
    packed = pool.run(isolated_logits, ParallelConfig(), folder.path, tokens)[0]
    for mine, logits in zip(tokens.split(LENGTHS, 1), packed.split(LENGTHS, 1), strict=True):
        alone = reference_logits(config, folder.read, mine)
        torch.testing.assert_close(logits, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        (ParallelConfig(tensor=2, sequence=True), "none"),
        (ParallelConfig(tensor=2), "selective"),
        (ParallelConfig(pipeline=2, interleave=2), "full"),
        (ParallelConfig(tensor=2, pipeline=2, sequence=True), "full"),
    ],
)
def test_layouts_agree(
    parallel: ParallelConfig, recompute: str, chameleon: tuple[Any, ...], pool: WorkerPool
) -> None:
    """Each micro-batch keeps its own documents, also where it is computed again."""
    run, (loss, gradients) = chameleon
    other = pool.run(loss_and_gradients, parallel, *run, recompute)[0]
    assert other[0] == pytest.approx(loss, rel=1e-12)
    assert distance(gradients, other[1]) < 1e-7


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> tuple[Any, ...]:
    """A model, a batch of unlike cuts and the dtype; its loss and gradients on one rank."""
    config = CONFIGS["chameleon"]
    path = pico_folder(tmp_path_factory.mktemp("isolation") / "model", config)
    batch = random_batch(config.vocab_size, samples=4, length=sum(LENGTHS))
    documents = documents_of(4)
    documents[1:, 4] = 1  # not the same cuts in each sample
    isolated = {**batch, "documents": documents, "positions": positions_within(documents)}
    run = (path, isolated, torch.float64)
    loss, gradients = pool.run(loss_and_gradients, ParallelConfig(), *run)[0]
    whole = pool.run(loss_and_gradients, ParallelConfig(), path, batch, torch.float64)[0]
    assert abs(whole[0] - loss) > 1e-3
    return run, (loss, gradients)
