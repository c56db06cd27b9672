"""Shards joined, documents chosen or withdrawn, sets verified: merge_data.py, verify_data.py."""

import json

import pyarrow.parquet
import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import open_set, read_info
from megatron_jam.data.prepare.held_out import HeldOut
from megatron_jam.data.prepare.merging import merge_shards, shards_of
from megatron_jam.data.prepare.running import Run, Shard
from megatron_jam.data.prepare.text import TextJob
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from tests.data.prepare.small import text_tools, texts, write_texts
from tests.helpers.commands import failure, run_tool

HELD_OUT = HeldOut(shares={"valid": 0.2})


def prepare(inputs, prefix, shard=None, held_out=HELD_OUT):
    run = Run(inputs=inputs, prefix=str(prefix), shard=shard, workers=1, bad="skip")
    run.prepare(TextJob(**text_tools(), held_out=held_out))


def documents(prefix):
    opened = open_set(prefix, text_tools()["vocabulary"])
    return [opened.document(i).tolist() for i in range(opened.num_documents)]


@pytest.fixture
def world(tmp_path):
    """Two inputs, one of which has a bad line, and a folder with the tokenizer."""
    tools = text_tools()
    tools["tokenizer"].save(tmp_path / "tokenizer/tokenizer.json")
    tools["vocabulary"].save(tmp_path / "tokenizer/vocabulary.json")
    for i in range(2):
        write_texts(tmp_path / f"{i}.jsonl", texts(60, i))
    with (tmp_path / "0.jsonl").open("a") as stream:
        stream.write("{}\n")
    return tmp_path


def inputs_of(world):
    return [str(world / "0.jsonl"), str(world / "1.jsonl")]


def test_joined_shards_are_the_whole(world):
    prepare(inputs_of(world), world / "whole/x")
    for i in range(5):
        prepare(inputs_of(world), world / "sets/x", Shard(i, 5))
    run_tool("merge_data", world / "sets/x", world / "tokenizer", world / "sets/x")
    for ending in (".bin", ".idx", ".parquet", ".rejected.jsonl"):
        for name in ("x", "x_valid"):
            whole, joined = (world / f"{f}/{name}{ending}" for f in ("whole", "sets"))
            if name == "x" or not ending.startswith(".rej"):
                assert joined.read_bytes() == whole.read_bytes()
    assert read_info(world / "sets/x").settings["shards"] == 5


def test_missing_and_other_shards_are_refused(world, capsys):
    for i in (0, 2):
        prepare(inputs_of(world), world / "sets/x", Shard(i, 4))
    told = failure(capsys, "merge_data", world / "sets/x", world / "tokenizer", world / "sets/x")
    assert "of 4 shards 2 are missing (1, 3): prepare them with --shard 1/4" in told
    prepare(inputs_of(world), world / "sets/x", Shard(1, 4), HeldOut())
    prepare(inputs_of(world), world / "sets/x", Shard(3, 4))
    told = failure(capsys, "merge_data", world / "sets/x", world / "tokenizer", world / "sets/x")
    assert "shards 1 are missing" in told or "other settings" in told
    assert not (world / "sets/x.json").exists()
    prepare(inputs_of(world)[:1], world / "sets/x", Shard(1, 4))
    told = failure(capsys, "merge_data", world / "sets/x", world / "tokenizer", world / "sets/x")
    assert "were made with other settings" in told
    with pytest.raises(UsageError, match="has shards of no parts"):
        shards_of(str(world / "sets/y"))
    prepare(inputs_of(world), world / "sets/x", Shard(0, 2))
    with pytest.raises(UsageError, match="has shards of 2 and 4 parts"):
        merge_shards(str(world / "sets/x"), text_tools()["vocabulary"])


def test_sets_made_alike_are_joined(world):
    for i, path in enumerate(inputs_of(world)):
        prepare(path, world / f"sets/{i}")
    prefixes = f"[{world / 'sets/0'},{world / 'sets/1'}]"
    run_tool("merge_data", prefixes, world / "tokenizer", world / "sets/both")
    assert documents(world / "sets/both") == documents(world / "sets/0") + documents(
        world / "sets/1"
    )
    rows = pyarrow.parquet.read_table(world / "sets/both.parquet").to_pylist()
    assert len(rows) == len(documents(world / "sets/both"))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_subset_by_tokens(world, seed):
    prepare(inputs_of(world), world / "sets/x", held_out=HeldOut())
    whole = documents(world / "sets/x")
    chosen = {}
    for tokens in (500, 2000):
        output = world / f"sets/x_{tokens}"
        run_tool(
            *("merge_data", world / "sets/x", world / "tokenizer", output),
            *("--tokens", tokens, "--seed", seed),
        )
        rows = pyarrow.parquet.read_table(f"{output}.parquet").to_pylist()
        places = [row["where"] for row in rows]
        everything = pyarrow.parquet.read_table(world / "sets/x.parquet").to_pylist()
        numbers = [i for i, row in enumerate(everything) if row["where"] in places]
        assert documents(output) == [whole[i] for i in numbers]
        total = read_info(output).num_tokens
        assert tokens - max(map(len, whole)) < total <= tokens
        chosen[tokens] = set(places)
    assert chosen[500] < chosen[2000]
    run_tool("verify_data", world / "sets/x_500", world / "tokenizer")


def test_withdrawn_records_are_gone(world, capsys):
    prepare(inputs_of(world), world / "sets/x", held_out=HeldOut())
    rows = pyarrow.parquet.read_table(world / "sets/x.parquet").to_pylist()
    gone = [rows[3]["where"], "book 7", str(rows[30]["pieces"][0])]
    (world / "list.txt").write_text("\n".join(gone) + "\n")
    arguments = "merge_data", world / "sets/x", world / "tokenizer", world / "sets/y"
    run_tool(*arguments, "--withdraw", world / "list.txt")
    pieces = {
        p
        for row in rows
        if row["where"] == gone[0] or row["source"] == gone[1]
        for p in row["pieces"]
    }
    pieces.add(rows[30]["pieces"][0])
    left = [i for i, row in enumerate(rows) if not pieces & set(row["pieces"])]
    assert documents(world / "sets/y") == [documents(world / "sets/x")[i] for i in left]
    assert len(left) <= 120 - 4
    (world / "list.txt").write_text("nobody\n")
    assert "has nothing of 'nobody'" in failure(
        capsys, *arguments, "--withdraw", world / "list.txt"
    )


@pytest.mark.parametrize("lines", [50, 70])
def test_nothing_is_chosen_by_a_side_table_of_another_set(world, capsys, lines):
    prepare(inputs_of(world)[0], world / "sets/x", held_out=HeldOut())
    write_texts(world / "2.jsonl", texts(lines))
    prepare(str(world / "2.jsonl"), world / "sets/y", held_out=HeldOut())
    (world / "sets/y.parquet").replace(world / "sets/x.parquet")
    where = pyarrow.parquet.read_table(world / "sets/x.parquet").to_pylist()[3]["where"]
    (world / "list.txt").write_text(where + "\n")
    for chosen in (("--withdraw", world / "list.txt"), ("--tokens", 500)):
        told = failure(
            *(capsys, "merge_data", world / "sets/x", world / "tokenizer", world / "sets/z"),
            *chosen,
        )
        assert "x.parquet is of another set: prepare the set again" in told
        assert not list((world / "sets").glob("z.*"))


def test_sets_are_verified(world, capsys):
    prepare(inputs_of(world), world / "sets/x")
    prepare(inputs_of(world)[0], world / "sets/y", held_out=HeldOut())
    verify = "verify_data", f"[{world / 'sets/x'},{world / 'sets/x_valid'}]", world / "tokenizer"
    run_tool(*verify)
    apart = "verify_data", world / "sets/x", world / "tokenizer", "--held_out"
    run_tool(*apart, f"[{world / 'sets/x_valid'}]")
    told = failure(capsys, *apart, f"[{world / 'sets/y'}]")
    assert "stands, or contains what stands, in a held-out set" in told
    assert "1 of 1 sets are not as they should be" in told


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "x.bin").write_bytes((d / "x.bin").read_bytes()[:-2]), "cut short"),
        (lambda d: (d / "y.parquet").replace(d / "x.parquet"), "x.parquet"),
        (lambda d: (d / "y.idx").replace(d / "x.idx"), "x"),
        (lambda d: (d / "y.json").replace(d / "x.json"), "x"),
        (lambda d: flip(d / "x.bin", 10), "not what"),
        (lambda d: flip(d / "x.bin", 11, 255), "outside of the"),
    ],
    ids=["cut", "side table", "index", "description", "byte", "id"],
)
def test_damage_is_found(world, capsys, spoil, message):
    prepare(inputs_of(world), world / "sets/x", held_out=HeldOut())
    prepare(inputs_of(world)[1], world / "sets/y", held_out=HeldOut())
    spoil(world / "sets")
    assert message in failure(capsys, "verify_data", world / "sets/x", world / "tokenizer")


def flip(path, place, value=None):
    data = bytearray(path.read_bytes())
    data[place] = data[place] ^ 1 if value is None else value
    path.write_bytes(data)


def test_another_vocabulary_or_tokenizer_is_found(world, capsys):
    prepare(inputs_of(world), world / "sets/x", held_out=HeldOut())
    folder = world / "tokenizer"
    text = json.loads((folder / "tokenizer.json").read_text())
    text["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    assert "another text tokenizer" in failure(capsys, "verify_data", world / "sets/x", folder)
    other = JointVocabulary.build(text_size=262, num_image_codes=32, num_sentinels=9)
    other.save(folder / "vocabulary.json")
    assert "another vocabulary" in failure(capsys, "verify_data", world / "sets/x", folder)
