"""JAM-Cross: where each tensor is from, and what the fused model computes at step 0."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import BridgeConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.fusion.fuse import fuse
from megatron_jam.models.parameters import PROJECTION, parameter_table
from megatron_jam.weights import reference
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.initial import initial_tensor
from tests.helpers.pico import SEPARATE, pico_config, pico_folder, pico_vocabulary
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import whole_logits

CONFIG = pico_config("tower", bias=True, affine_norm=True)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An LLM and an image model in float64."""
    root = tmp_path_factory.mktemp("cross")
    return (
        pico_folder(root / "llm", CONFIG, seed=1),
        pico_folder(root / "image", CONFIG, seed=2),
    )


def make(parents: tuple[Path, Path], output: Path, **settings: object) -> WeightsFolder:
    text, image = parents
    fuse(FusionRecipe(method="cross", text=text, image=image, output=output, **settings))  # type: ignore[arg-type]
    return WeightsFolder(output)


def test_towers_are_the_parents(parents: tuple[Path, Path], tmp_path: Path) -> None:
    child = make(parents, tmp_path / "child")
    text, image = (WeightsFolder(p) for p in parents)
    assert child.config.towers == {
        "image": image.config.towers["main"],
        "text": text.config.towers["main"],
    }
    seen = 0
    for tower, parent in (("text", text), ("image", image)):
        for name in parent.names:
            if name.startswith("layers."):
                assert torch.equal(
                    child.read(name.replace(".main.", f".{tower}.")), parent.read(name)
                )
                seen += 1
    # Six weights and six biases, two norms of two.
    assert seen == 2 * 4 * 16


def test_shared_tables(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows of text ids are the LLM's; picture codes, <break>, <eoss>, sentinels, positions not."""
    child = make(parents, tmp_path / "child")
    text, image = (WeightsFolder(p) for p in parents)
    vocabulary = pico_vocabulary()
    name = "embedding.tokens.weight"
    rows = child.read(name)
    assert (vocabulary.text.start, vocabulary.text.stop, vocabulary.size) == (0, 300, 322)
    assert torch.equal(rows[:300], text.read(name)[:300])
    assert torch.equal(rows[300:], image.read(name)[300:])
    assert not torch.equal(text.read(name)[300:], image.read(name)[300:])
    places = "embedding.positions.weight"
    assert torch.equal(child.read(places), image.read(places))
    for kind in ("weight", "bias"):
        due = (text.read(f"head.norm.{kind}") + image.read(f"head.norm.{kind}")) / 2
        assert torch.equal(child.read(f"head.norm.{kind}"), due)


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_new_tensors_are_drawn_from_seed_and_name(
    every: int, parents: tuple[Path, Path], tmp_path: Path
) -> None:
    child = make(parents, tmp_path / "child", every=every, seed=7)
    assert child.config.bridges == BridgeConfig(every=every, start="random")
    fresh = [e for e in parameter_table(child.config) if e.name.startswith("bridges.")]
    layers = sorted({int(e.name.split(".")[1]) for e in fresh})
    assert layers == ([i for i in range(4) if i % every == 0] if every else [])
    fresh += [e for e in parameter_table(child.config) if e.name == PROJECTION]
    for entry in fresh:
        due = initial_tensor(entry, child.config, seed=7).double()
        assert torch.equal(child.read(entry.name), due), entry.name
    other = make(parents, tmp_path / "other", every=every, seed=8)
    assert not torch.equal(other.read(PROJECTION), child.read(PROJECTION))


def tower_states(child: WeightsFolder, tower: str, tokens: Tensor) -> Tensor:
    """States of one tower behind its last layer, as if the other were not there."""
    places = torch.arange(tokens.shape[1]) + child.config.position_offset
    x = child.read("embedding.tokens.weight")[tokens]
    x = x + child.read("embedding.positions.weight")[places]
    settings = child.config.towers[tower]
    context = reference._context(tokens, None, None)
    for layer in range(settings.num_layers):
        x = reference._layer(settings, child.read, f"layers.{layer}.{tower}", x, context)
    return x


def test_zero_bridges_and_half_projection_are_the_mean_of_the_towers(
    parents: tuple[Path, Path], tmp_path: Path
) -> None:
    """logits = norm((h_image + h_text) / 2) E^T."""
    child = make(parents, tmp_path / "child", bridges="zero", projection="half")
    tokens = torch.randint(4, 322, (2, 9), generator=torch.Generator().manual_seed(0))
    states = [tower_states(child, tower, tokens) for tower in ("image", "text")]
    assert not torch.allclose(*states, rtol=0.1)
    mean = (states[0] + states[1]) / 2
    normed = torch.nn.functional.layer_norm(
        mean, (32,), child.read("head.norm.weight"), child.read("head.norm.bias"), 1e-5
    )
    due = normed @ child.read("embedding.tokens.weight").T
    logits = reference.reference_logits(child.config, child.read, tokens)
    assert torch.allclose(logits, due, rtol=1e-10, atol=1e-10)


def test_random_bridges_move_the_logits(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing about `zero`."""
    tokens = torch.randint(4, 322, (1, 9), generator=torch.Generator().manual_seed(0))
    logits = []
    for start in ("zero", "random"):
        child = make(parents, tmp_path / start, bridges=start, projection="half")
        logits.append(reference.reference_logits(child.config, child.read, tokens))
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_provenance(parents: tuple[Path, Path], tmp_path: Path) -> None:
    child = make(parents, tmp_path / "child", every=1, bridges="zero", seed=3)
    told = child.provenance["recipe"]
    assert {k: told[k] for k in ("method", "every", "bridges", "projection", "seed")} == {
        "method": "cross",
        "every": "1",
        "bridges": "zero",
        "projection": "random",
        "seed": "3",
    }
    assert set(child.provenance["sha256"]) == set(child.names)


UNEQUAL = pico_config(
    "tower", num_layers=3, hidden_size=24, num_heads=2, bias=True, affine_norm=True
)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An LLM of width 32 with 4 layers and an image model of width 24 with 3."""
    root = tmp_path_factory.mktemp("unequal")
    return (
        pico_folder(root / "llm", CONFIG, seed=1),
        pico_folder(root / "image", UNEQUAL, seed=2),
    )


def test_unequal_parents_share_a_table_of_the_wider(
    unequal: tuple[Path, Path], tmp_path: Path
) -> None:
    """With zero bridges the image tower reads the first 24 columns, as its parent did."""
    child = make(unequal, tmp_path / "child", bridges="zero", head="wide")
    text, image = (WeightsFolder(p) for p in unequal)
    name = "embedding.tokens.weight"
    rows = child.read(name)
    assert torch.equal(rows[:300], text.read(name)[:300])
    assert torch.equal(rows[300:, :24], image.read(name)[300:])
    assert torch.count_nonzero(rows[300:, 24:]) == 0
    places = "embedding.positions.weight"
    assert torch.equal(child.read(places), text.read(places))
    for where in ("embedding", "head"):
        shape = (24, 32) if where == "embedding" else (32, 24)
        assert torch.equal(
            child.read(f"{where}.image.projection.weight").float(), torch.eye(*shape)
        )
    tokens = torch.randint(4, 300, (1, 9), generator=torch.manual_seed(0))
    logits = reference.reference_logits(child.config, child.read, tokens)
    due = reference.reference_logits(text.config, text.read, tokens)
    assert torch.equal(logits[..., :300], due[..., :300])


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_separate_towers_with_zero_bridges_are_both_parents(
    kind: str,
    parents: tuple[Path, Path],
    unequal: tuple[Path, Path],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    """Text ids have exactly the LLM's logits, all others exactly the image model's."""
    parents = parents if kind == "equal" else unequal
    child = make(parents, tmp_path / "child", **SEPARATE, bridges="zero")
    text, image = (WeightsFolder(p) for p in parents)
    tokens = torch.randint(4, child.config.vocab_size, (2, 24), generator=torch.manual_seed(0))
    logits = {
        name: reference.reference_logits(folder.config, folder.read, tokens)
        for name, folder in (("child", child), ("text", text), ("image", image))
    }
    rows = slice(pico_vocabulary().text.start, pico_vocabulary().text.stop)
    is_text = torch.zeros(child.config.vocab_size, dtype=torch.bool)
    is_text[rows] = True
    assert torch.equal(logits["child"][..., is_text], logits["text"][..., is_text])
    assert torch.equal(logits["child"][..., ~is_text], logits["image"][..., ~is_text])
    for name, folder in (("child", child), ("text", text), ("image", image)):
        run = (folder.path, tokens, torch.float64)
        (found,) = pool.run(whole_logits, ParallelConfig(), *run)
        torch.testing.assert_close(found, logits[name], rtol=0, atol=1e-12)
        logits[f"{name} of a model"] = found
    child_rows, parent_rows = (logits[f"{name} of a model"] for name in ("child", "text"))
    assert torch.equal(child_rows[..., is_text], parent_rows[..., is_text])
    parent_rows = logits["image of a model"]
    assert torch.equal(child_rows[..., ~is_text], parent_rows[..., ~is_text])
    moved = make(parents, tmp_path / "moved", **SEPARATE, bridges="random")
    other = reference.reference_logits(moved.config, moved.read, tokens)
    assert float((other - logits["child"]).abs().max()) > 1e-3
