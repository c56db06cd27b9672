"""Pairs: pictures from every source, ready-made codes, retrieved pairs, pictures that are bad."""

import base64
import io
import json
import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_jam.config.errors import UsageError
from megatron_jam.data.index_file import read_index
from megatron_jam.data.indexed import open_set
from megatron_jam.data.prepare.held_out import HeldOut, piece_hash
from megatron_jam.data.prepare.pairs import PairJob
from megatron_jam.data.prepare.running import Run
from megatron_jam.tokenizers.document import caption_image_document
from megatron_jam.tokenizers.image import pixels_from_image
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from tests.data.prepare.small import (
    NUM_CODES,
    content_of,
    encoding,
    image_folder,
    png,
    text_tools,
    texts,
    write_bytes,
    write_tar,
)
from tests.helpers.commands import run_tool

CODES = "codes made elsewhere"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images") / "tokenizer")


def prepare(inputs, prefix, images, bad="skip", workers=1, **settings):
    config = {"batch_size": 4}
    if images == CODES:
        config["codes_per_image"] = 4
    job = PairJob(**text_tools(), images=encoding(images, **config), **settings)
    Run(inputs=str(inputs), prefix=str(prefix), workers=workers, bad=bad).prepare(job)


def documents(prefix):
    opened = open_set(prefix, text_tools()["vocabulary"])
    return [opened.document(i).tolist() for i in range(opened.num_documents)]


def rejected(prefix):
    with open(f"{prefix}.rejected.jsonl") as stream:
        return [json.loads(line) for line in stream]


def laid_out(caption, codes, retrieved=()):
    tools = text_tools()
    encode = tools["tokenizer"].encode
    front = [(encode(c), m) for c, m in retrieved]
    return caption_image_document(tools["vocabulary"], encode(caption), codes, front).tolist()


def codes_of(images, data):
    pixels = pixels_from_image(Image.open(io.BytesIO(data)), 16)
    return load_image_tokenizer(images).encode(pixels[None])[0].tolist()


def write_pairs(folder, kind, captions):
    pictures = [png(i) for i in range(len(captions))]
    if kind == "tar":
        files = {}
        for i, caption in enumerate(captions):
            files |= {f"{i}.png": pictures[i], f"{i}.txt": caption.encode()}
            files |= {f"{i}.json": json.dumps({"license": "CC0", "url": f"u/{i}"}).encode()}
        return write_tar(folder / "x.tar", files)
    if kind == "parquet":
        rows = [
            {"caption": c, "image": {"bytes": p, "path": None}, "license": "CC0", "url": f"u/{i}"}
            for i, (c, p) in enumerate(zip(captions, pictures, strict=True))
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "x.parquet")
        return folder / "x.parquet"
    for i, data in enumerate(pictures):
        (folder / "all").mkdir(exist_ok=True)
        (folder / f"all/{i}.png").write_bytes(data)
    rows = [
        {"file_name": f"{i}.png", "text": c, "license": "CC0", "url": f"u/{i}"}
        for i, c in enumerate(captions)
    ]
    (folder / "all/metadata.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    return folder / "all"


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_pictures_of_every_source(tmp_path, images, kind):
    captions = texts(9)
    prepare(write_pairs(tmp_path, kind, captions), tmp_path / "sets/x", images, bad="stop")
    expected = [laid_out(c, codes_of(images, png(i))) for i, c in enumerate(captions)]
    assert documents(tmp_path / "sets/x") == expected
    rows = pyarrow.parquet.read_table(tmp_path / "sets/x.parquet").to_pylist()
    assert [(row["source"], row["licence"]) for row in rows] == [
        (f"u/{i}", "CC0") for i in range(9)
    ]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, images):
    path = write_pairs(tmp_path, "tar", texts(40))
    for workers in (1, 3):
        prepare(path, tmp_path / f"{workers}/x", images, workers=workers)
    assert content_of(tmp_path / "1") == content_of(tmp_path / "3")


def test_codes_that_were_made_elsewhere(tmp_path):
    lines = [
        {"text": '<img alt="a "quoted" </s> cat" src="I5 I31 I0 I7 ">'},
        {"caption": "a dog", "codes": [1, 2, 3, 4]},
        {"caption": "a mat", "codes": "I1 I2 I3 I31"},
        {"caption": "too few", "codes": [1, 2, 3]},
        {"caption": "too high", "codes": [1, 2, 3, NUM_CODES]},
        {"caption": "no numbers", "codes": ["a", 2, 3, 4]},
        {"caption": "a picture", "image": "x.png"},
    ]
    path = write_bytes(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)).encode())
    prepare(path, tmp_path / "sets/x", CODES)
    assert documents(tmp_path / "sets/x") == [
        laid_out('a "quoted" </s> cat', [5, 31, 0, 7]),
        laid_out("a dog", [1, 2, 3, 4]),
        laid_out("a mat", [1, 2, 3, 31]),
    ]
    table = pyarrow.Table.from_pylist(lines[1:2])  # a column of integers
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    prepare(tmp_path / "x.parquet", tmp_path / "sets/y", CODES, bad="stop")
    assert documents(tmp_path / "sets/y") == [laid_out("a dog", [1, 2, 3, 4])]
    assert [
        (each["where"].rsplit(":")[-1], each["reason"]) for each in rejected(tmp_path / "sets/x")
    ] == [
        ("4", "3 codes, not 4"),
        ("5", "a code is not in 0..31"),
        ("6", "the codes are no list of whole numbers"),
        ("7", "it has a picture where codes are needed"),
    ]
    with pytest.raises(UsageError, match=r"set encoding\.codes_per_image"):
        encoding("nowhere")


def pairs_with_retrieved(path, count=30, num_retrieved=4):
    rng = np.random.default_rng(0)
    captions = [f"{i} {text}" for i, text in enumerate(texts(count))]
    codes = rng.integers(0, NUM_CODES, (count, 4)).tolist()
    lines = []
    for i in range(count):
        others = rng.choice([j for j in range(count) if j != i], num_retrieved, replace=False)
        found = [{"caption": captions[j], "codes": codes[j]} for j in others[:-1]]
        source = " ".join(f"I{code}" for code in codes[others[-1]])
        found.append(f'<img alt="{captions[others[-1]]}" src="{source}">')
        # Itself among them: it must not stand in front of itself.
        found.append({"caption": captions[i], "codes": codes[i]})
        lines.append(
            {
                "caption": captions[i],
                "codes": codes[i],
                "retrieved": found,
                "others": others.tolist(),
            }
        )
    write_bytes(path, "\n".join(map(json.dumps, lines)).encode())
    return captions, codes, lines


def test_retrieved_pairs_are_laid_out_in_front(tmp_path):
    """Each as a sequence of its own, so that a run can choose; all of them if it does not."""
    captions, codes, lines = pairs_with_retrieved(tmp_path / "x.jsonl")
    prepare(tmp_path / "x.jsonl", tmp_path / "sets/x", CODES, bad="stop", retrieved=3)
    front = [[(captions[i], codes[i]) for i in line["others"][:3]] for line in lines]
    found = documents(tmp_path / "sets/x")
    assert found == [laid_out(*each) for each in zip(captions, codes, front, strict=True)]
    index = read_index(tmp_path / "sets/x")
    assert index.sequences.borders.tolist() == list(range(0, 5 * 30 + 1, 5))
    stream = np.concatenate(found)
    sequences = np.split(stream, index.sequences.edges[1:-1])
    for number in range(30):
        first, *retrieved, last = (each.tolist() for each in sequences[5 * number : 5 * number + 5])
        alone = laid_out(captions[number], codes[number])
        assert first + last == alone
        assert [alone[:1] + each[:-1] + alone[-1:] for each in retrieved] == [
            laid_out(*each) for each in front[number]
        ]
    rows = pyarrow.parquet.read_table(tmp_path / "sets/x.parquet").to_pylist()
    hashes = {
        piece_hash(np.array(laid_out(c, m)[1:-1])): i
        for i, (c, m) in enumerate(zip(captions, codes, strict=True))
    }
    for number, row in enumerate(rows):
        drawn = [hashes[piece] for piece in row["pieces"]]
        assert drawn == [*lines[number]["others"][:3], number]
    # Without them each document is one sequence, as in any set of pairs.
    prepare(tmp_path / "x.jsonl", tmp_path / "sets/y", CODES, bad="stop")
    assert read_index(tmp_path / "sets/y").sequences is None
    assert documents(tmp_path / "sets/y") == [
        laid_out(*each) for each in zip(captions, codes, strict=True)
    ]
    with pytest.raises(UsageError, match="retrieved must be at least 0, not -1"):
        prepare(tmp_path / "x.jsonl", tmp_path / "sets/z", CODES, retrieved=-1)


def test_what_is_held_out_is_retrieved_by_no_training_document(tmp_path):
    pairs_with_retrieved(tmp_path / "x.jsonl", count=100)
    held_out = HeldOut(shares={"valid": 0.3})
    prepare(
        tmp_path / "x.jsonl",
        tmp_path / "sets/x",
        CODES,
        retrieved=3,
        held_out=held_out,
    )
    training = pyarrow.parquet.read_table(tmp_path / "sets/x.parquet").to_pylist()
    valid = pyarrow.parquet.read_table(tmp_path / "sets/x_valid.parquet").to_pylist()
    own = {row["pieces"][-1] for row in valid}
    assert 10 < len(own) < 50
    assert not own & {piece for row in training for piece in row["pieces"]}
    assert len(training) + len(valid) == 100


def test_withdrawn_pairs_are_retrieved_no_more(tmp_path):
    """What is left is what would have been made had they never been there, if no candidate was left
    out for them."""
    *_, lines = pairs_with_retrieved(tmp_path / "x.jsonl", num_retrieved=3)
    prepare(tmp_path / "x.jsonl", tmp_path / "x", CODES, bad="stop", retrieved=3)
    tools = text_tools()
    tools["tokenizer"].save(tmp_path / "tokenizer/tokenizer.json")
    tools["vocabulary"].save(tmp_path / "tokenizer/vocabulary.json")
    rows = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist()
    gone = range(0, 30, 2)
    # Some by the place of their record, others by their hash.
    names = [rows[i]["where"] if i % 4 else str(rows[i]["pieces"][-1]) for i in gone]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    left = tmp_path / "left"
    arguments = "merge_data", tmp_path / "x", tmp_path / "tokenizer", left
    run_tool(*arguments, "--withdraw", tmp_path / "list.txt")
    for i, line in enumerate(lines):
        fields = zip(line["retrieved"], [*line["others"], i], strict=True)
        line["retrieved"] = [each for each, number in fields if number not in gone]
    remaining = [json.dumps(line) for i, line in enumerate(lines) if i not in gone]
    write_bytes(tmp_path / "y.jsonl", "\n".join(remaining).encode())
    prepare(tmp_path / "y.jsonl", tmp_path / "due", CODES, bad="stop", retrieved=3)
    for ending in ("bin", "idx"):
        due = (tmp_path / f"due.{ending}").read_bytes()
        assert (tmp_path / f"left.{ending}").read_bytes() == due
    pieces, due = (
        pyarrow.parquet.read_table(tmp_path / f"{name}.parquet").column("pieces").to_pylist()
        for name in ("left", "due")
    )
    assert pieces == due
    assert {len(each) for each in pieces} == {1, 2, 3, 4}
    run_tool("verify_data", left, tmp_path / "tokenizer")
    # A budget of tokens counts what is left of the documents.
    some, budget = tmp_path / "some", sum(map(len, documents(left))) // 2
    run_tool(*arguments[:-1], some, "--withdraw", tmp_path / "list.txt", "--tokens", budget)
    found = documents(some)
    assert all(each in documents(left) for each in found)
    assert budget - max(map(len, documents(left))) < sum(map(len, found)) <= budget
    run_tool("verify_data", some, tmp_path / "tokenizer")


def bomb(width, height):
    """A PNG of some hundred bytes that says it is this large."""

    def part(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + part(b"IDAT", zlib.compress(b"\0" * 1000))
        + part(b"IEND", b"")
    )


def test_bad_pictures_are_listed_and_the_run_goes_on(tmp_path, images):
    wide = io.BytesIO()
    Image.new("RGB", (40_000, 3), "red").save(wide, "PNG")
    truncated = png(1, (300, 300))
    files = {
        "good.png": png(0),
        "wide.png": wide.getvalue(),
        "square.png": bomb(40_000, 40_000),
        "tall.png": bomb(10_000, 9_000),
        "cut.png": truncated[: len(truncated) // 2],
        "none.png": b"",
        "html.png": b"<html>not found</html>",
        "svg.jpg": base64.b64decode("PHN2Zz48L3N2Zz4="),
    }
    named = {}
    for name, data in files.items():
        named |= {name: data, f"{name.split('.')[0]}.txt": b"a cat"}
    path = write_tar(tmp_path / "x.tar", named)
    prepare(path, tmp_path / "sets/x", images)
    expected = [laid_out("a cat", codes_of(images, files[n])) for n in ("good.png", "wide.png")]
    assert documents(tmp_path / "sets/x") == expected
    reasons = {
        each["where"].split("'")[1]: each["reason"] for each in rejected(tmp_path / "sets/x")
    }
    assert list(reasons) == ["square", "tall", "cut", "none", "html", "svg"]
    assert all(each.startswith("the picture cannot be read (") for each in reasons.values())
    assert "exceeds limit" in reasons["square"] or "more than" in reasons["square"]
    assert "10000 x 9000 pixels are more than" in reasons["tall"]
    assert "truncated" in reasons["cut"]
    with pytest.raises(UsageError, match="record 'square': the picture cannot be read"):
        prepare(path, tmp_path / "sets/y", images, bad="stop")
