"""Conversations as LIMA has them, and how-to articles."""

import json

import numpy as np
import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import open_set
from megatron_jam.data.prepare.corpus import read_texts
from megatron_jam.data.prepare.interleaved import InterleavedJob, choose_articles
from megatron_jam.data.prepare.running import Run, Shard
from megatron_jam.data.prepare.store import PictureStore
from megatron_jam.data.prepare.turns import Selection
from megatron_jam.tokenizers.document import answer_mask, conversation_document, split_document
from tests.data.prepare.small import (
    encoding,
    image_folder,
    png,
    text_tools,
    write_bytes,
    write_tar,
)


def write(path, records):
    return write_bytes(path, "\n".join(map(json.dumps, records)).encode())


def prepare(inputs, prefix, pictures=(), images=None, shard=None, bad="stop", **selection):
    job = InterleavedJob(
        **text_tools(),
        images=images,
        pictures=PictureStore(pictures),
        selection=Selection(**selection),
    )
    run = Run(inputs=str(inputs), prefix=str(prefix), workers=1, bad=bad, shard=shard)
    run.prepare(choose_articles(job, run.files()))


def opened(prefix):
    found = open_set(prefix, text_tools()["vocabulary"])
    return [found.document(i).astype(np.int64) for i in range(found.num_documents)]


def shown(document):
    tools = text_tools()
    return [
        tools["tokenizer"].decode(ids) if kind == "text" else ids.tolist()
        for kind, ids in split_document(tools["vocabulary"], document)
    ]


LIMA = [
    {"conversations": ["q1", "a1"], "source": "stackexchange"},
    {"conversations": ["q1", "a1", "q2", "a2", "q3"], "source": "multi_turn"},
]


def test_conversations_have_an_end_after_every_answer(tmp_path):
    prepare(write(tmp_path / "x.jsonl", LIMA), tmp_path / "sets/x")
    vocabulary, encode = text_tools()["vocabulary"], text_tools()["tokenizer"].encode
    documents = opened(tmp_path / "sets/x")
    end = [vocabulary.eos]
    assert documents[1].tolist() == [
        *(end + encode("q1") + end + encode("a1") + end),
        *(encode("q2") + end + encode("a2") + end),  # the question without an answer goes
    ]
    answers = documents[1][answer_mask(vocabulary, documents[1])]
    assert answers.tolist() == encode("a1") + end + encode("a2") + end
    prepare(tmp_path / "x.jsonl", tmp_path / "sets/y", max_turns=1)
    assert opened(tmp_path / "sets/y")[1].tolist() == documents[0].tolist()


def article(title, category="Cooking", rating=95, pictures=2):
    parts = {"text1": "This article shows how. In this article, look:"}
    for i in range(1, pictures + 1):
        parts |= {f"image{i}": f"p{i}", f"text{i + 1}": f"step {i}"}
    return {"title": title, "category": category, "rating": rating, **parts}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interleaved")
    write_tar(folder / "pictures.tar", {f"p{i}.png": png(i) for i in range(1, 7)})
    return folder, encoding(image_folder(folder / "images"), batch_size=4)


def test_articles_become_answers(world, tmp_path):
    folder, images = world
    path = write(tmp_path / "x.jsonl", [article("How to cook", pictures=5)])
    prepare(path, tmp_path / "sets/x", [folder / "pictures.tar"], images)
    (document,) = opened(tmp_path / "sets/x")
    found = shown(document)
    assert found[:2] == [
        "How to cook",
        "The following answer shows how. In the following answer, look:",
    ]
    assert [each for each in found if isinstance(each, str)][2:] == [
        "step 1",
        "step 2",
        "step 3\nstep 4\nstep 5",
    ]
    assert sum(isinstance(each, list) for each in found) == 3  # the texts of the others stay
    prepare(path, tmp_path / "sets/y", [folder / "pictures.tar"], images, max_pictures=None)
    assert sum(isinstance(each, list) for each in shown(opened(tmp_path / "sets/y")[0])) == 5


def test_articles_are_chosen_by_rating_length_and_category(world, tmp_path):
    folder, images = world
    records = [
        article(f"c{i} {j}", f"c{i}", 85 + j % 10, pictures=1 + j % 3)
        for i in range(4)
        for j in range(12 if i else 3)
    ]
    path = write(tmp_path / "x.jsonl", records)
    selection = {"min_rating": 88, "num_articles": 11, "context_length": 130}
    prepare(path, tmp_path / "sets/x", [folder / "pictures.tar"], images, **selection)
    documents = opened(tmp_path / "sets/x")
    assert max(map(len, documents)) <= 130
    titles = [shown(each)[0] for each in documents]
    categories = [title.split()[0] for title in titles]
    by_title = {record["title"]: record for record in records}
    assert all(by_title[title]["rating"] > 88 for title in titles)
    assert len(titles) == 11
    counts = [categories.count(f"c{i}") for i in range(4)]
    assert counts[0] == 0  # none of it is rated so high
    assert max(counts[1:]) - min(counts[1:]) <= 1
    for i in range(3):
        prepare(
            path, tmp_path / "sets/x", [folder / "pictures.tar"], images, Shard(i, 3), **selection
        )
    shards = [tmp_path / f"sets/x-0000{i}-of-00003" for i in range(3)]
    found = [
        shown(each)[0]
        for shard in shards
        if (shard.parent / f"{shard.name}.bin").exists()
        for each in opened(shard)
    ]
    assert found == titles
    with pytest.raises(UsageError, match="num_articles is 40, but only"):
        prepare(path, tmp_path / "sets/y", [folder / "pictures.tar"], images, num_articles=40)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": ["q"]}, "no question with an answer"),
        ({"conversations": ["q", ""]}, "a turn of 'conversations' is missing, empty"),
        ({"title": "t"}, "neither 'text1' nor 'answer'"),
        ({"title": "t", "text1": "x", "image1": "p9"}, "has no image 'p9'"),
        ({"title": "t", "text1": "x", "image1": "../p1"}, "has no image '../p1'"),
        ({"title": "t", "text1": "x", "image1": "I1 I2"}, "2 codes, not 16"),
    ],
)
def test_bad_records_are_named(world, tmp_path, record, message):
    folder, images = world
    path = write(tmp_path / "x.jsonl", [*LIMA, record])
    with pytest.raises(UsageError, match=f"x.jsonl:3: .*{message}"):
        prepare(path, tmp_path / "sets/x", [folder / "pictures.tar"], images)


def test_what_is_left_out_is_listed(world, tmp_path):
    folder, images = world
    path = write(
        tmp_path / "x.jsonl", [*LIMA, article("t", rating=80), article("long", pictures=3)]
    )
    prepare(
        path,
        tmp_path / "sets/x",
        [folder / "pictures.tar"],
        images,
        min_rating=90,
        context_length=60,
    )
    listed = [json.loads(line) for line in (tmp_path / "sets/x.rejected.jsonl").open()]
    assert [each["is_bad"] for each in listed] == [False, False]
    assert listed[0]["reason"] == "its rating is 80"
    assert "more than context_length 60" in listed[1]["reason"]
    assert len(opened(tmp_path / "sets/x")) == 2


def test_texts_of_all_forms_train_a_tokenizer(tmp_path):
    records = [
        *LIMA[:1],
        article("t", pictures=0),
        {"text": "plain"},
        {"caption": "a cat", "codes": [1]},
    ]
    assert list(read_texts(write(tmp_path / "x.jsonl", records))) == [
        *("q1", "a1", "t", "The following answer shows how. In the following answer, look:"),
        *("plain", "a cat"),
    ]


def test_a_conversation_has_no_empty_turn():
    vocabulary = text_tools()["vocabulary"]
    for turns, message in (
        ([[("text", [5])]], "the last question has no answer"),
        ([[("text", [])], [("text", [5])]], "the question is empty"),
        ([[("text", [5])], []], "the answer is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            conversation_document(vocabulary, turns)
