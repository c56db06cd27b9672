"""A folder with all that the phases' configurations name, in small: data, parents, fusions."""

import dataclasses
import io
import json
import runpy
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.data.indexed import write_set
from megatron_jam.fusion.fuse import fuse
from megatron_jam.tokenizers.document import (
    caption_image_sequences,
    question_answer_document,
    text_document,
)
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from megatron_jam.weights.folder import TOKENIZER, VOCABULARY

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "examples" / "quickstart" / "data"
TEXT_SIZE, SIDE, LEVELS = 512, 4, 4
"""Ids of text; a picture is SIDE x SIDE codes, each a colour of LEVELS^3."""

FRESH = ("cm3leon_350m", "cm3leon_760m", "cm3leon_7b", "llm")
TEXT_SETS = ("commoncrawl", "c4", "wikipedia", "books", "arxiv")
PAIR_SETS = {"shutterstock": 3, "shutterstock_sample": 3, "shutterstock_heldout": 0, "coco": 0}
"""With the number of pairs that were retrieved for each."""
ANSWER_SETS = ("lima", "wikihow", "wikihow_heldout")

Tokens = NDArray[np.int64]


def build_workspace(folder: Path) -> None:
    """Write data/ and weights/fresh/ into `folder`: an eighth of the quickstart's data, with
    pictures as mosaics of colours, which takes no training; and an image tokenizer without any,
    which draws noise."""
    vocabulary = JointVocabulary.build(
        text_size=TEXT_SIZE, num_image_codes=LEVELS**3, num_sentinels=16
    )
    texts = [record["text"] for record in _records("text.jsonl")][::8]
    tokenizer = TextTokenizer.train(texts, vocab_size=TEXT_SIZE)
    source = folder / "tokenizer"
    source.mkdir(parents=True, exist_ok=True)
    tokenizer.save(source / TOKENIZER)
    vocabulary.save(source / VOCABULARY)
    images = VqTokenizer(VqConfig(image_size=4 * SIDE, channels=(4,), num_codes=LEVELS**3))
    images.save(folder / "weights" / "image_tokenizer")
    pictures = dict(_mosaics())
    sets: dict[str, list[Tokens] | list[list[Tokens]]] = {}
    for name in (*TEXT_SETS, "wikipedia_heldout", "c4_heldout"):
        held_out = name.endswith("heldout")
        chosen = texts[-20:] if held_out else texts[:-20]
        sets[name] = [text_document(vocabulary, tokenizer.encode(text)) for text in chosen]
    captions = [record for record in _records("pairs.tar") if record["id"] in pictures]
    pairs = [(tokenizer.encode(each["text"]), pictures[each["id"]]) for each in captions[::8]]
    for name, num_retrieved in PAIR_SETS.items():
        sets[name] = [
            caption_image_sequences(vocabulary, *pair, [*pairs, *pairs][i : i + num_retrieved])
            for i, pair in enumerate(pairs, start=1)
        ]
    for name in ANSWER_SETS:
        sets[name] = [
            question_answer_document(
                vocabulary, tokenizer.encode(each["question"]), _parts(each, tokenizer, pictures)
            )
            for each in _records("interleaved.jsonl")[::8]
        ]
    for name, documents in sets.items():
        _write(folder / "data" / name, documents, vocabulary, tokenizer, images.sha256)
    init = runpy.run_path(str(ROOT / "tools" / "init.py"))["main"]
    for seed, name in enumerate(FRESH):
        init(HERE / "tower.yaml", source, folder / "weights" / "fresh" / name, seed=seed)


def fuse_all(folder: Path) -> None:
    """Make the fusions of examples/recipes in `folder`: of the parents that were trained there, or
    of fresh ones."""
    parents = {"text": "llm_4096", "image": "cm3leon_7b"}
    places = {}
    for name, parent in parents.items():
        trained = folder / "outputs" / "parents" / parent / "weights"
        fresh = folder / "weights" / "fresh" / parent.removesuffix("_4096")
        places[name] = trained if trained.exists() else fresh
    for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml")):
        recipe = FusionRecipe.load(path)
        fuse(dataclasses.replace(recipe, **places, output=folder / recipe.output))


def _write(
    prefix: Path,
    documents: list[Tokens] | list[list[Tokens]],
    vocabulary: JointVocabulary,
    tokenizer: TextTokenizer,
    image_tokenizer_sha256: str,
) -> None:
    has_pictures = any((vocabulary.modality[np.hstack(each)] == 1).any() for each in documents)
    is_text = prefix.name in TEXT_SETS or not has_pictures
    write_set(
        prefix,
        documents,
        vocabulary=vocabulary,
        tokenizer_sha256=tokenizer.sha256,
        kind="text" if is_text else "interleaved" if prefix.name in ANSWER_SETS else "pairs",
        image_tokenizer_sha256=image_tokenizer_sha256 if has_pictures else "",
    )


def _records(name: str) -> list[dict]:
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in (SOURCES / name).read_text().splitlines()]
    with tarfile.open(SOURCES / name) as archive:
        members = [each for each in archive if each.name.endswith(".txt")]
        return [
            {"id": each.name.removesuffix(".txt"), "text": _read(archive, each).decode().strip()}
            for each in members
        ]


def _mosaics() -> Iterator[tuple[str, Tokens]]:
    """Each picture's codes: its mean colours on a grid, coarsely."""
    with tarfile.open(SOURCES / "pairs.tar") as archive:
        for member in archive:
            if member.name.endswith(".png"):
                picture = Image.open(io.BytesIO(_read(archive, member))).convert("RGB")
                small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=int)
                digits = small.reshape(-1, 3) * LEVELS // 256
                yield member.name.removesuffix(".png"), digits @ [LEVELS**2, LEVELS, 1]


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def _parts(
    record: dict, tokenizer: TextTokenizer, pictures: dict[str, Tokens]
) -> list[tuple[str, Tokens]]:
    """An answer's first sentence and picture, which fit in a tiny context."""
    parts: list[tuple[str, Tokens]] = []
    for part in record["answer"][:2]:
        if "text" in part:
            parts.append(("text", np.asarray(tokenizer.encode(part["text"]))[:24]))
        else:
            parts.append(("image", pictures[part["image"]]))
    return parts
