"""Every fusion of parents with norms of heads, gates, grouped queries and untied heads."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.fusion.fuse import fuse
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import LLAMA, SEPARATE, pico_config, pico_folder, pico_vocabulary
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import whole_logits

TOWER = dataclasses.replace(pico_config("tower", **LLAMA, qk_norm=True, num_layers=2), tied=False)
NORM, HEAD = "layers.1.main.attention.q_norm.weight", "head.output.weight"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightsFolder, WeightsFolder]:
    """An LLM and an image model in float64."""
    root = tmp_path_factory.mktemp("chameleon")
    text, image = (pico_folder(root / str(seed), TOWER, seed=seed) for seed in (1, 2))
    return WeightsFolder(text), WeightsFolder(image)


@pytest.mark.parametrize(
    ("method", "extra"),
    [("uniform", {}), ("width", {}), ("cross", {}), ("cross", SEPARATE)],
)
def test_child_is_whole_and_runs(
    method: str,
    extra: dict[str, str],
    parents: tuple[WeightsFolder, WeightsFolder],
    tmp_path: Path,
    pool: WorkerPool,
) -> None:
    text, image = parents
    settings = {"method": method, "text": text.path, "image": image.path, **extra}
    fuse(FusionRecipe(**settings, output=tmp_path / "child"))
    child = WeightsFolder(tmp_path / "child")
    t, i = text.read(HEAD), image.read(HEAD)
    if method == "uniform":
        assert torch.equal(child.read(NORM), (text.read(NORM) + image.read(NORM)) / 2)
        assert torch.equal(child.read(HEAD), (t + i) / 2)
    elif method == "width":
        assert child.config.towers["main"].kv_heads == 2 * TOWER.towers["main"].kv_heads
        assert torch.equal(child.read(NORM), torch.cat([text.read(NORM), image.read(NORM)]))
        assert torch.equal(child.read(HEAD), torch.cat([t, i], dim=1))
    elif extra:
        assert torch.equal(child.read("head.text.output.weight"), t)
        assert torch.equal(child.read("head.image.output.weight"), i)
    else:
        span = pico_vocabulary().text
        is_text = (torch.arange(len(t)) >= span.start) & (torch.arange(len(t)) < span.stop)
        assert torch.equal(child.read(HEAD), torch.where(is_text[:, None], t, i))
    generator = torch.Generator().manual_seed(0)
    tokens: Tensor = torch.randint(4, TOWER.vocab_size, (2, 12), generator=generator)
    ours = pool.run(whole_logits, ParallelConfig(), child.path, tokens, torch.float64)[0]
    expected = reference_logits(child.config, child.read, tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
