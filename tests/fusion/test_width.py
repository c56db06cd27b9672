"""JAM-Width against equations 2 and 3 of the paper, block by block and as a function."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.fusion.fuse import fuse
from megatron_jam.models.parameters import num_parameters
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import whole_logits

D = 32


def make(root: Path, config: ModelConfig, fill: str) -> tuple[WeightsFolder, ...]:
    """LLM, image model and child, in float64."""
    text = pico_folder(root / "llm", config, seed=1)
    image = pico_folder(root / "image", config, seed=2)
    fuse(
        FusionRecipe(
            method="width",
            text=text,
            image=image,
            output=root / "child",
            fill=fill,  # type: ignore[arg-type]
        )
    )
    return WeightsFolder(text), WeightsFolder(image), WeightsFolder(root / "child")


@pytest.fixture(scope="module", params=["copy", "average", "diagonal"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, tuple[WeightsFolder, ...]]:
    """Every kind of tensor: biases and affine norms, an FFN that is not 4 d."""
    config = pico_config("tower", num_layers=2, bias=True, affine_norm=True, ffn_size=48)
    return request.param, make(tmp_path_factory.mktemp("width"), config, request.param)


def test_child_is_twice_as_wide(family: tuple[str, tuple[WeightsFolder, ...]]) -> None:
    _, (text, _, child) = family
    (tower,) = child.config.towers.values()
    assert (tower.hidden_size, tower.num_heads, tower.inner_size) == (2 * D, 8, 96)
    assert tower.num_layers == 2
    assert child.config.vocab_size == text.config.vocab_size
    assert child.config.max_positions == text.config.max_positions
    read = [child.read(name).numel() for name in child.names]
    assert sum(read) == num_parameters(child.config)


def test_every_projection_is_eq_2_or_3_or_diagonal(
    family: tuple[str, tuple[WeightsFolder, ...]],
) -> None:
    fill, (text, image, child) = family
    matrices = [n for n in child.names if n.endswith("weight") and n.startswith("layers.")]
    matrices = [n for n in matrices if "norm" not in n]
    assert len(matrices) == 2 * 6
    for name in matrices:
        t, i, c = text.read(name), image.read(name), child.read(name)
        rows, columns = t.shape
        none = torch.zeros_like(t)
        due = {
            "copy": ((t, t), (i, i)),
            "average": ((t, (t + i) / 2), (i, (t + i) / 2)),
            "diagonal": ((t, none), (none, i)),
        }[fill]
        assert c.shape == (2 * rows, 2 * columns)
        for line, half in zip(due, c.chunk(2), strict=True):
            for block, found in zip(line, half.chunk(2, dim=1), strict=True):
                assert torch.equal(found, block), name


def test_tables_and_vectors_stand_side_by_side(
    family: tuple[str, tuple[WeightsFolder, ...]],
) -> None:
    _, (text, image, child) = family
    tables = ["embedding.tokens.weight", "embedding.positions.weight"]
    for name in tables:
        assert torch.equal(child.read(name)[:, :D], text.read(name))
        assert torch.equal(child.read(name)[:, D:], image.read(name))
    vectors = [n for n in child.names if n.endswith("bias") or "norm" in n]
    # A layer: six biases, two norms of two; the last norm.
    assert len(vectors) == 2 * (6 + 4) + 2
    for name in vectors:
        size = text.read(name).numel()
        assert torch.equal(child.read(name)[:size], text.read(name)), name
        assert torch.equal(child.read(name)[size:], image.read(name)), name
    assert len(child.names) == len(tables) + len(vectors) + 2 * 6


@pytest.mark.parametrize(
    "kind",
    [
        {"bias": True, "affine_norm": True},
        {**LLAMA, "qk_norm": True},
        {"activation": "gelu", "norm": "rms"},
    ],
    ids=["opt", "chameleon", "rms"],
)
def test_each_half_of_a_diagonal_width_is_its_parent(
    kind: dict, tmp_path: Path, pool: WorkerPool
) -> None:
    """Its states in every layer, and so its logits are the sum of the parents'."""
    text, image, child = make(tmp_path, pico_config("tower", num_layers=2, **kind), "diagonal")
    assert child.config.towers["main"].norm_groups == 2
    tokens = torch.randint(4, 322, (2, 9), generator=torch.Generator().manual_seed(0))
    due = [reference_logits(folder.config, folder.read, tokens) for folder in (text, image)]
    assert not torch.allclose(*due, rtol=0.1)
    found = reference_logits(child.config, child.read, tokens)
    torch.testing.assert_close(found, due[0] + due[1], rtol=1e-12, atol=1e-12)
    for half in range(2):
        # Output rows that read one half alone show that half's states.
        def rows(name: str, half: int = half) -> Tensor:
            whole = child.read(name)
            if name != "embedding.tokens.weight":
                return whole
            return torch.cat([whole, whole * halves(half)])

        logits = reference_logits(child.config, rows, tokens)[..., 322:]
        torch.testing.assert_close(logits, due[half], rtol=1e-12, atol=1e-12)
    (by_models,) = pool.run(whole_logits, ParallelConfig(), child.path, tokens, torch.float64)
    torch.testing.assert_close(by_models, found, rtol=1e-12, atol=1e-12)


def halves(half: int) -> Tensor:
    """1 for the columns of a half, else 0."""
    return (torch.arange(2 * D) // D == half).double()


def test_projection_reads_the_sum_of_both_halves(tmp_path: Path) -> None:
    """[u; v] -> [T(u + v); I(u + v)]."""
    text, image, child = make(tmp_path, pico_config("tower", num_layers=1), "copy")
    u, v = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in ("attention.q", "attention.out", "ffn.fc1"):
        name = f"layers.0.main.{kind}.weight"
        out = torch.cat([u, v], dim=-1) @ child.read(name).T
        due = [(u + v) @ parent.read(name).T for parent in (text, image)]
        assert torch.allclose(out, torch.cat(due, dim=-1), rtol=1e-12, atol=1e-12)


def heads_of(parent: WeightsFolder, s: Tensor) -> Tensor:
    """Causal attention of a parent's four heads over states `s` [S, d], before `out`."""
    q, k, v = ((s @ parent.read(f"layers.0.main.attention.{x}.weight").T) for x in "qkv")
    size = D // 4
    result = torch.empty_like(q)
    for head in range(4):
        cut = slice(head * size, (head + 1) * size)
        for place in range(len(s)):
            scores = k[: place + 1, cut] @ q[place, cut] / math.sqrt(size)
            result[place, cut] = scores.softmax(0) @ v[: place + 1, cut]
    return result


def norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)


def test_child_computes_with_its_parents_whole_heads(tmp_path: Path) -> None:
    """A layer of the child, written down with the parents' weights alone.

    Were a head cut or in another place, its scores would mix two of the parents' heads.
    """
    text, image, child = make(tmp_path, pico_config("tower", num_layers=1), "copy")
    parents = (text, image)
    tokens = torch.randint(4, 322, (7,), generator=torch.Generator().manual_seed(0))

    def table(name: str) -> Tensor:
        return torch.cat([p.read(f"embedding.{name}.weight") for p in parents], dim=1)

    def both(name: str, s: Tensor) -> Tensor:
        return torch.cat([s @ p.read(f"layers.0.main.{name}.weight").T for p in parents], dim=1)

    def halves_added(x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]

    x = table("tokens")[tokens] + table("positions")[2:9]
    s = halves_added(norm(x))
    x = x + both("attention.out", heads_of(text, s) + heads_of(image, s))
    inner = both("ffn.fc1", halves_added(norm(x))).relu()
    x = x + both("ffn.fc2", halves_added(inner))
    due = norm(x) @ table("tokens").T
    logits = reference_logits(child.config, child.read, tokens[None])[0]
    assert torch.allclose(logits, due, rtol=1e-10, atol=1e-10)
