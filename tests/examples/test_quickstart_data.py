"""The quickstart's committed data: complete, consistent, and with a clean hold-out."""

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
DATA = QUICKSTART / "data"
PACKAGES = ("fonts-noto-color-emoji", "unicode-cldr-core", "wordnet-base")
SOURCES = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/unicode/cldr/common/annotations/en.xml"),
    Path("/usr/share/wordnet/data.noun"),
)


def read_pairs(path: Path) -> dict[str, dict[str, bytes]]:
    pairs: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, extension = member.name.split(".")
            pairs.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return pairs


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, bytes]]:
    return read_pairs(DATA / "pairs.tar")


@pytest.fixture(scope="module")
def held_out() -> dict[str, dict[str, bytes]]:
    return read_pairs(DATA / "pairs_heldout.tar")


def test_counts_and_size(trained, held_out):
    assert len(trained) >= 300
    assert 20 <= len(held_out) <= 40
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 5_000_000
    assert 500_000 <= (DATA / "text.jsonl").stat().st_size <= 1_000_000


def test_every_pair_is_a_picture_a_caption_and_a_description(trained, held_out):
    captions = []
    for key, pair in {**trained, **held_out}.items():
        image = Image.open(io.BytesIO(pair["png"]))
        assert (image.size, image.mode) == ((64, 64), "RGB")
        assert image.getpixel((0, 0)) == (255, 255, 255) or key in ("bridge", "window", "brick")
        description = json.loads(pair["json"])
        assert description["key"] == key
        assert description.keys() == {
            "key", "name", "keywords", "codepoints", "source", "licence",
        }  # fmt: skip
        caption = pair["txt"].decode()
        assert re.match(f"((a|an|the) )?{re.escape(description['name'])}: ", caption, re.IGNORECASE)
        assert caption[0].isupper()
        assert 2 <= len(caption.split()) <= 13
        captions.append(caption)
    assert len(set(captions)) == len(trained) + len(held_out)


def test_pictures_are_far_from_one_another(trained, held_out):
    """The measure of the quickstart is the nearest neighbour by L2 on pixels."""
    pngs = [pair["png"] for pair in (*trained.values(), *held_out.values())]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png)), np.float64).ravel() for png in pngs])
    squares = (pixels**2).sum(1)
    distances = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distances, np.inf)
    assert np.sqrt(distances.min() / pixels.shape[1]) > 15  # of 255


def test_questions_answers_and_their_pictures(trained, held_out):
    for name, pairs in (("interleaved.jsonl", trained), ("interleaved_heldout.jsonl", held_out)):
        records = read_lines(name)
        assert [record["id"] for record in records if record["id"] not in pairs] == []
        assert len(records) == len(pairs)
        assert len({record["question"] for record in records}) == len(records)
        for record in records:
            definition, image, relatives = record["answer"]
            assert image == {"image": record["id"]}
            for text in (definition["text"], relatives["text"]):
                assert text[0].isupper()
                assert text.endswith(".")
                assert ";" not in text
                assert '"' not in text
                assert len(text.split()) <= 25
    strawberry = next(r for r in read_lines("interleaved.jsonl") if r["id"] == "strawberry")
    assert strawberry["question"] == "What is a strawberry?"
    assert strawberry["answer"][0]["text"] == "A strawberry is a sweet fleshy red fruit."
    assert strawberry["answer"][2]["text"] == "A strawberry is a kind of berry, like the blueberry."


def test_held_out_concepts_are_in_no_training_file(trained, held_out):
    assert not trained.keys() & held_out.keys()
    assert not {p["png"] for p in trained.values()} & {p["png"] for p in held_out.values()}
    names = {json.loads(pair["json"])["name"] for pair in held_out.values()}
    texts, texts_held_out = read_lines("text.jsonl"), read_lines("text_heldout.jsonl")
    ids = {record["id"] for record in texts}
    assert len(ids) == len(texts)
    assert trained.keys() <= ids
    assert not ids & held_out.keys()
    assert not ids & {record["id"] for record in texts_held_out}
    assert held_out.keys() <= {record["id"] for record in texts_held_out}
    for record in texts:
        subject = re.match(r"What (?:is|are) (?:(?:a|an|the) )?(.*?)\? [A-Z]", record["text"])
        assert subject[1].lower() not in names
    definitions = {r["answer"][0]["text"] for r in read_lines("interleaved_heldout.jsonl")}
    assert not [r["id"] for r in texts if any(d in r["text"] for d in definitions)]
    asked = {record["question"] for record in read_lines("interleaved.jsonl")}
    assert not asked & {record["question"] for record in read_lines("interleaved_heldout.jsonl")}


def test_sources_and_licences_travel_with_the_data():
    text = (DATA / "SOURCES.md").read_text("utf-8")
    for package in PACKAGES:
        assert package in text
    assert "SIL OPEN FONT LICENSE Version 1.1" in text
    assert "COPYRIGHT AND PERMISSION NOTICE" in text
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in text
    for name in ("text.jsonl", "text_heldout.jsonl"):
        assert all(record["source"] and record["licence"] for record in read_lines(name))


def build(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(QUICKSTART / "build_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_missing_source_names_its_package(tmp_path):
    result = build("--font", str(tmp_path / "none.ttf"), "--output", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "apt install fonts-noto-color-emoji" in result.stderr


@pytest.mark.skipif(
    not all(path.is_file() for path in SOURCES), reason=f"needs the packages {', '.join(PACKAGES)}"
)
def test_the_build_gives_the_committed_data(tmp_path, trained):
    result = build("--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for name in ("text", "text_heldout", "interleaved", "interleaved_heldout"):
        built = (tmp_path / f"{name}.jsonl").read_bytes()
        assert built == (DATA / f"{name}.jsonl").read_bytes()
    # Another Pillow may compress otherwise; the pixels are the same.
    for key, pair in read_pairs(tmp_path / "pairs.tar").items():
        assert (pair["txt"], pair["json"]) == (trained[key]["txt"], trained[key]["json"])
        old, new = (np.asarray(Image.open(io.BytesIO(p["png"]))) for p in (trained[key], pair))
        assert np.array_equal(old, new)
