"""Parents of unlike vocabularies: which row of which parent each of the child's ids takes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.fuse import Fusion, fuse
from megatron_jam.fusion.vocabulary import PLAN_FILE
from megatron_jam.models.parameters import parameter_table
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import TOKENIZER, VOCABULARY, FolderWriter, WeightsFolder
from megatron_jam.weights.initial import drawn_row
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import SEPARATE, pico_config, pico_tensors

TOKENS = "embedding.tokens.weight"


def parent(
    root: Path, texts: list[str], sizes: tuple[int, int, int], *, seed: int, unused: int = 0
) -> WeightsFolder:
    """A model whose vocabulary has (text, codes, sentinels) ids, and `unused` ones behind."""
    source = root / f"{root.name}_tokenizer"
    tokenizer = TextTokenizer.train(texts, vocab_size=sizes[0])
    tokenizer.save(source / TOKENIZER)
    vocabulary = JointVocabulary.build(
        text_size=tokenizer.vocab_size, num_image_codes=sizes[1], num_sentinels=sizes[2]
    )
    vocabulary = dataclasses.replace(vocabulary, size=vocabulary.size + unused)
    vocabulary.save(source / VOCABULARY)
    config = dataclasses.replace(
        pico_config("tower", num_layers=1),
        vocab_size=vocabulary.size,
        text_ids=list(vocabulary.text),
    )
    shapes = {entry.name: entry.shape for entry in parameter_table(config)}
    path = root / "weights"
    with FolderWriter(
        path, config=config, source=source, shapes=shapes, dtype=torch.float64
    ) as writer:
        for name, tensor in pico_tensors(config, seed=seed).items():
            writer.write(name, tensor)
        writer.finish({"source": "test"})
    return WeightsFolder(path)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightsFolder, WeightsFolder]:
    """An LLM without codes, and an image model of other merges, with 3 ids that have no name."""
    root = tmp_path_factory.mktemp("parents")
    for name in ("llm", "image"):
        (root / name).mkdir()
    text = parent(root / "llm", ["the quick brown fox", "fox and box"], (270, 0, 0), seed=1)
    image = parent(root / "image", ["a quick red fox", "the box"], (266, 16, 4), seed=2, unused=3)
    return text, image


def recipe(parents: tuple[WeightsFolder, WeightsFolder], output: Path, **settings) -> FusionRecipe:
    text, image = parents
    return FusionRecipe(text=text.path, image=image.path, output=output, **settings)


def spelt(folder: WeightsFolder) -> dict[str, int]:
    return TextTokenizer.load(folder.tokenizer_path).tokens()


def test_text_rows_are_the_llms_by_token(
    parents: tuple[WeightsFolder, WeightsFolder], tmp_path: Path
) -> None:
    """What the LLM lacks stays the image model's; nothing goes by number."""
    text, image = parents
    fuse(recipe(parents, tmp_path / "child", method="cross"))
    child = WeightsFolder(tmp_path / "child")
    assert child.vocabulary == image.vocabulary
    rows, of_text, of_image = (folder.read(TOKENS) for folder in (child, text, image))
    known, moved, kept = spelt(text), 0, 0
    for token, number in spelt(image).items():
        if token in known:
            assert torch.equal(rows[number], of_text[known[token]]), token
            moved += number != known[token]
        else:
            assert torch.equal(rows[number], of_image[number]), token
            kept += 1
    assert moved > 0
    assert kept > 0
    assert torch.equal(rows[image.vocabulary.text.stop :], of_image[image.vocabulary.text.stop :])


def test_the_plan_is_saved(parents: tuple[WeightsFolder, WeightsFolder], tmp_path: Path) -> None:
    text, image = parents
    fuse(recipe(parents, tmp_path / "child", method="cross"))
    lines = (tmp_path / "child" / PLAN_FILE).read_text().splitlines()
    assert lines[0].split("\t") == ["id", "token", "takes", "row of text", "row of image"]
    assert len(lines) == image.vocabulary.size + 1
    vocabulary = image.vocabulary
    known = spelt(text)
    shared = next(t for t, i in spelt(image).items() if known.get(t, i) != i and t.isalpha())
    expected = {
        vocabulary.bos: ["<bos>", "text", "0", "0"],
        spelt(image)[shared]: [shared, "text", str(known[shared]), str(spelt(image)[shared])],
        vocabulary.image.start + 5: ["<image:5>", "image", "-1", str(vocabulary.image.start + 5)],
        vocabulary.break_: ["<break>", "image", "-1", str(vocabulary.break_)],
        vocabulary.sentinel(2): ["<sentinel:2>", "image", "-1", str(vocabulary.sentinel(2))],
    }
    last = vocabulary.size - 1
    expected[last] = [f"<unnamed:{last}>", "image", "-1", str(last)]
    for number, due in expected.items():
        assert lines[number + 1].split("\t") == [str(number), *due]


def test_a_third_vocabulary_draws_what_neither_has(
    parents: tuple[WeightsFolder, WeightsFolder], tmp_path: Path
) -> None:
    """By the token's name: whatever its number, and wherever else it is drawn."""
    text, image = parents
    third = tmp_path / "third"
    TextTokenizer.train(["zebras zebra the fox", "quick"], vocab_size=268).save(third / TOKENIZER)
    number = TextTokenizer.load(third / TOKENIZER).tokens()
    vocabulary = JointVocabulary.build(text_size=len(number), num_image_codes=20, num_sentinels=5)
    vocabulary.save(third / VOCABULARY)
    settings = {"method": "cross", "tokenizer": third, "seed": 3}
    fuse(recipe(parents, tmp_path / "child", **settings))
    child = WeightsFolder(tmp_path / "child")
    assert child.config.vocab_size == vocabulary.size
    rows = child.read(TOKENS)
    new = [t for t in number if t not in spelt(text) and t not in spelt(image)]
    assert new
    for token in new:
        due = drawn_row(f"{TOKENS}|{token}", 32, 0.006, seed=3).double()
        assert torch.equal(rows[number[token]], due), token
    due = drawn_row(f"{TOKENS}|<image:19>", 32, 0.006, seed=3).double()
    assert torch.equal(rows[vocabulary.image.start + 19], due)
    assert torch.equal(
        rows[vocabulary.image.start + 15], image.read(TOKENS)[image.vocabulary.image.start + 15]
    )
    other = Fusion.plan(recipe(parents, tmp_path / "other", **{**settings, "seed": 4}))
    assert other.parents.plan.takes.count("drawn") == len(new) + 4 + 1


def test_uniform_averages_what_both_have(
    parents: tuple[WeightsFolder, WeightsFolder], tmp_path: Path
) -> None:
    text, image = parents
    fuse(recipe(parents, tmp_path / "child", method="uniform", text_share=0.25))
    rows, of_text, of_image = (
        folder.read(TOKENS) for folder in (WeightsFolder(tmp_path / "child"), text, image)
    )
    known = spelt(text)
    for token, number in spelt(image).items():
        due = of_image[number]
        if token in known:
            due = 0.25 * of_text[known[token]] + 0.75 * due
        assert torch.allclose(rows[number], due, rtol=1e-15, atol=0), token
    stop = image.vocabulary.text.stop
    assert torch.equal(rows[stop:], of_image[stop:])


def test_a_tower_with_its_own_table_reads_tokens_as_its_parent_did(
    parents: tuple[WeightsFolder, WeightsFolder], tmp_path: Path
) -> None:
    """With zero bridges and the wide head: both parents' logits, in the child's ids."""
    text, image = parents
    fuse(recipe(parents, tmp_path / "child", method="cross", bridges="zero", **SEPARATE))
    child = WeightsFolder(tmp_path / "child")
    known = spelt(text)
    pairs = [(i, known[t]) for t, i in spelt(image).items() if t in known]
    of_child, of_text = (torch.tensor(each) for each in zip(*pairs, strict=True))
    places = torch.arange(20) * 13 % len(pairs)
    logits = reference_logits(child.config, child.read, of_child[places][None])
    due = reference_logits(text.config, text.read, of_text[places][None])
    assert torch.equal(logits[..., of_child], due[..., of_text])
    of_image = reference_logits(image.config, image.read, of_child[places][None])
    stop = image.vocabulary.text.stop
    assert torch.equal(logits[..., stop:], of_image[..., stop:])
    certificate = child.provenance["certificate"]
    assert certificate["distance_to_text"]["kl_divergence"] < 1e-6
    assert certificate["distance_to_text"]["same_likeliest"] == 1
    assert certificate["distance_to_image"]["largest_difference"] > 0.1


def test_swapped_parents_are_told(
    parents: tuple[WeightsFolder, WeightsFolder], tmp_path: Path
) -> None:
    text, image = parents
    with pytest.raises(UsageError, match="are text and image swapped"):
        fuse(recipe((image, text), tmp_path / "child", method="cross"))
    assert not (tmp_path / "child").exists()


def test_equal_vocabularies_go_by_number(
    parents: tuple[WeightsFolder, WeightsFolder], tmp_path: Path
) -> None:
    """Also ids that have no name."""
    _, image = parents
    plan = Fusion.plan(recipe((image, image), tmp_path / "x", method="cross")).parents.plan
    for tower in ("text", "image"):
        assert np.array_equal(plan.rows[tower], np.arange(image.vocabulary.size))
    assert plan.takes[-3:] == ["image"] * 3
