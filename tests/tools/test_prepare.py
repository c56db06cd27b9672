import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_jam.data.indexed import open_set
from megatron_jam.data.prepare.readers import read_records
from megatron_jam.data.prepare.text import load_text_folder
from megatron_jam.tokenizers.document import answer_mask, split_document
from megatron_jam.tokenizers.image import pixels_from_image
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer
from tests.helpers.commands import failure, run_tool

COLOURS = {"cherry": "darkred", "lemon": "yellow", "lime": "lightgreen"}
CAPTIONS = {key: f"{key}: a {colour} fruit" for key, colour in COLOURS.items()}
CAPTIONS["lime"] += " </s><break> \N{LEMON}\n"  # must stay plain text; the line break goes
TEXTS = ["a cherry is a fruit", "a lemon is a sour fruit  \n", "a lime has <pad> in it"]
ANSWER = [{"text": "a sour fruit,"}, {"text": "like this: "}, {"image": "lemon"}, {"text": "eat!"}]
RECORDS = [
    {"id": "lemon", "question": "what is a lemon?", "answer": ANSWER},
    {"id": "lime", "question": "show a lime", "answer": [{"image": "lime"}, {"image": "cherry"}]},
]


def picture(key):
    image = Image.new("RGB", (20, 12), "white")
    image.paste(COLOURS[key], (4, 2, 14, 10))
    return image


def png(key):
    stream = io.BytesIO()
    picture(key).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture
def world(tmp_path):
    """Raw files of a small world, a text tokenizer and an image tokenizer."""
    write_lines(tmp_path / "text.jsonl", [{"id": "x", "text": text} for text in TEXTS])
    write_lines(tmp_path / "questions.jsonl", RECORDS)
    files = {}
    for key, caption in CAPTIONS.items():
        files |= {f"{key}.png": png(key), f"{key}.txt": caption.encode(), f"{key}.json": b"{}"}
    write_tar(tmp_path / "pairs.tar", files)
    config = VqConfig(image_size=16, channels=(8,), num_blocks=1, num_codes=32)
    VqTokenizer(config).save(tmp_path / "image")
    inputs = ",".join(str(tmp_path / n) for n in ("text.jsonl", "questions.jsonl", "pairs.tar"))
    run_tool(
        *("train_text_tokenizer", f"[{inputs}]", tmp_path / "text_tokenizer"),
        *("--vocab_size", 300, "--num_image_codes", 32, "--num_sentinels", 8),
    )
    return tmp_path


def opened(world, name):
    tokenizer, vocabulary = load_text_folder(world / "text_tokenizer")
    prepared = open_set(world / "sets" / name, vocabulary)
    documents = [prepared.document(i).astype(np.int64) for i in range(prepared.num_documents)]
    return prepared.info, documents, tokenizer, vocabulary


def codes_of(world, key):
    tokenizer = load_image_tokenizer(world / "image")
    return tokenizer.encode(pixels_from_image(picture(key), 16)[None])[0].tolist()


def shown(vocabulary, tokenizer, document):
    return [
        (kind, tokenizer.decode(ids) if kind == "text" else ids.tolist())
        for kind, ids in split_document(vocabulary, document)
    ]


def test_text_tokenizer(world):
    tokenizer, vocabulary = load_text_folder(world / "text_tokenizer")
    assert tokenizer.vocab_size == 300
    assert vocabulary == JointVocabulary.build(text_size=300, num_image_codes=32, num_sentinels=8)
    assert len(tokenizer.encode("fruit")) < 5


def test_prepare_text(world):
    run_tool("prepare_text", world / "text.jsonl", world / "text_tokenizer", world / "sets/text")
    info, documents, tokenizer, vocabulary = opened(world, "text")
    assert (info.kind, info.tokenizer_sha256) == ("text", tokenizer.sha256)
    assert info.image_tokenizer_sha256 == ""
    assert [each.tolist() for each in documents] == [
        [*tokenizer.encode(text.rstrip()), vocabulary.eos] for text in TEXTS
    ]
    assert sum(each.tolist().count(vocabulary.pad) for each in documents) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_prepare_images(world, batch_size):
    run_tool(
        *("prepare_images", world / "pairs.tar", world / "text_tokenizer", world / "image"),
        *(world / "sets/pairs", "--encoding.batch_size", batch_size),
    )
    info, documents, tokenizer, vocabulary = opened(world, "pairs")
    assert info.kind == "pairs"
    assert info.image_tokenizer_sha256 == load_image_tokenizer(world / "image").sha256
    assert info.tokens_by_modality["image"] == 3 * 16
    assert info.tokens_by_modality["special"] == 3 * 3
    for key, document in zip(CAPTIONS, documents, strict=True):
        text = tokenizer.encode(CAPTIONS[key].rstrip())
        image = vocabulary.image_id(codes_of(world, key)).tolist()
        assert document.tolist() == [
            *(vocabulary.eos, *text, vocabulary.break_, *image, vocabulary.eos)
        ]


def test_prepare_interleaved(world):
    run_tool(
        *("prepare_interleaved", world / "questions.jsonl", world / "text_tokenizer"),
        *(world / "sets/questions", "--pictures", world / "pairs.tar"),
        *("--image_tokenizer", world / "image"),
    )
    info, documents, tokenizer, vocabulary = opened(world, "questions")
    assert info.kind == "interleaved"
    assert info.image_tokenizer_sha256 == load_image_tokenizer(world / "image").sha256
    assert shown(vocabulary, tokenizer, documents[0]) == [
        ("text", "what is a lemon?"),
        ("text", "a sour fruit,\nlike this:"),
        ("image", codes_of(world, "lemon")),
        ("text", "eat!"),
    ]
    assert shown(vocabulary, tokenizer, documents[1]) == [
        ("text", "show a lime"),
        ("image", codes_of(world, "lime")),
        ("image", codes_of(world, "cherry")),
    ]
    eos, break_ = vocabulary.eos, vocabulary.break_
    answer = documents[1][answer_mask(vocabulary, documents[1])].tolist()
    assert [answer[16], *answer[-2:]] == [break_, break_, eos]
    assert len(answer) == 2 * 17 + 1


BAD_LINES = {
    b'{"text": "good"}\n\n{"text": "bad"\n': "text.jsonl:3: not valid JSON",
    b'{"text": "good"}\n{"text": "\xff"}\n': "text.jsonl:2: not valid JSON",
    b'["good"]\n': "text.jsonl:1: not a JSON object but list",
    b'{"txt": "good"}\n': "text.jsonl:1: 'text' is missing",
    b'{"text": "  "}\n': "text.jsonl:1: 'text' is missing, empty",
    b'{"text": "\\ud800"}\n': "text.jsonl:1: 'text' has a lone surrogate",
    b"": "text.jsonl: the file is empty",
    b"\n\n": "text.jsonl: the file is empty",
}


@pytest.mark.parametrize("content", BAD_LINES)
def test_bad_lines_are_named(world, capsys, content):
    (world / "text.jsonl").write_bytes(content)
    arguments = world / "text.jsonl", world / "text_tokenizer", world / "sets/text"
    assert BAD_LINES[content] in failure(capsys, "prepare_text", *arguments)
    assert not list((world / "sets").iterdir())


BAD_ANSWERS = {
    "'answer' is missing": {"question": "?"},
    "'question' is missing": {"answer": [{"text": "a"}]},
    "a part of 'answer' is neither": {"question": "?", "answer": [{"video": "lime"}]},
    "a part of 'answer' is missing, empty": {"question": "?", "answer": [{"text": ""}]},
    "has no image 'plum'": {"question": "?", "answer": [{"image": "lime"}, {"image": "plum"}]},
}


@pytest.mark.parametrize("message", BAD_ANSWERS)
def test_bad_answers_are_named(world, capsys, message):
    path = write_lines(world / "questions.jsonl", [*RECORDS, BAD_ANSWERS[message]])
    error = failure(
        *(capsys, "prepare_interleaved", path, world / "text_tokenizer", world / "sets/questions"),
        *("--pictures", world / "pairs.tar", "--image_tokenizer", world / "image"),
    )
    assert f"{path}:3: " in error
    assert message in error


BAD_PAIRS = {
    "record 'plum': 'txt' is missing": {"plum.png": png("lime")},
    "record 'plum': it has no picture": {"plum.txt": b"a plum"},
    "record 'plum': 'txt' is not utf-8": {"plum.png": png("lime"), "plum.txt": b"\xff"},
    "record 'plum': 'txt' is missing, empty": {"plum.png": png("lime"), "plum.txt": b" "},
    "record 'plum': the picture cannot be read": {"plum.png": b"no", "plum.txt": b"a plum"},
    "record 'plum': the picture cannot": {"plum.png": png("lime")[:60], "plum.txt": b"a plum"},
    "pairs.tar: the file is empty": {},
}


@pytest.mark.parametrize("message", BAD_PAIRS)
def test_bad_pairs_are_named(world, capsys, message):
    path = write_tar(world / "pairs.tar", BAD_PAIRS[message])
    arguments = path, world / "text_tokenizer", world / "image", world / "sets/pairs"
    assert message in failure(capsys, "prepare_images", *arguments, "--bad", "stop")


def test_a_truncated_tar_is_named(world, capsys):
    path = world / "pairs.tar"
    path.write_bytes(path.read_bytes()[:700])
    arguments = path, world / "text_tokenizer", world / "image", world / "sets/pairs"
    assert f"{path}: it is not a whole .tar file" in failure(
        capsys, "prepare_images", *arguments, "--bad=stop"
    )


def test_other_mistakes_are_named(world, capsys):
    missing = world / "nothing.jsonl", world / "text_tokenizer", world / "sets/text"
    assert "no such file or folder" in failure(capsys, "prepare_text", *missing)
    no_tokenizer = world / "text.jsonl", world, world / "sets/text"
    assert "no tokenizer at" in failure(capsys, "prepare_text", *no_tokenizer)
    arguments = world / "pairs.tar", world / "text_tokenizer", world / "image", world / "sets/x"
    assert "batch_size must be" in failure(
        capsys, "prepare_images", *arguments, "--encoding.batch_size", 0
    )
    wrong = JointVocabulary.build(text_size=300, num_image_codes=33, num_sentinels=8)
    wrong.save(world / "text_tokenizer" / "vocabulary.json")
    assert "--num_image_codes 32" in failure(capsys, "prepare_images", *arguments)
    wrong = JointVocabulary.build(text_size=301, num_image_codes=32, num_sentinels=8)
    wrong.save(world / "text_tokenizer" / "vocabulary.json")
    assert "301 text ids" in failure(capsys, "prepare_images", *arguments)
    assert "vocab_size" in failure(
        *(capsys, "train_text_tokenizer", f"[{world / 'text.jsonl'}]", world / "out"),
        *("--vocab_size", 100),
    )
    assert "of no known kind" in failure(
        *(capsys, "train_text_tokenizer", f"[{world / 'text.xml'}]", world / "out")
    )


def test_records_of_a_tar_are_neighbours_of_one_key(tmp_path):
    files = {"a/x.b.png": b"1", "a/x.txt": b"2", "b/x.txt": b"3"}
    records = list(read_records(write_tar(tmp_path / "x.tar", files)))
    assert [(record.key, record.fields) for record in records] == [
        ("a/x", {"b.png": b"1", "txt": b"2"}),
        ("b/x", {"txt": b"3"}),
    ]
