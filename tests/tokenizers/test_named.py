"""A tokenizer that mixes text, image codes and marks is taken apart by the names of its tokens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.named import has_image_tokens, image_token_name, read_named
from tests.helpers.mixed import mixed_tokenizer
from tests.helpers.pico import pico_tokenizer, pico_vocabulary

CODES = 16


def save(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_names_of_codes() -> None:
    assert image_token_name(0) == "IMGIMGAZ"
    assert image_token_name(8191) == "IMGIMGIBJBZ"


@pytest.mark.parametrize("marks", ["sentinel", "reserved"])
def test_each_id_is_what_its_name_says(marks: str, tmp_path: Path) -> None:
    content, names = mixed_tokenizer(codes=CODES, marks=marks, seed=1)
    path = save(tmp_path / "tokenizer.json", content)
    assert has_image_tokens(path)
    found = read_named(path)
    vocabulary = found.vocabulary
    old = {name: number for number, name in enumerate(names)}
    assert sorted(found.ids) == list(range(len(names)))
    image = found.ids[vocabulary.image.start : vocabulary.image.stop]
    assert image == [old[image_token_name(code)] for code in range(CODES)]
    assert image != sorted(image)
    form = "<sentinel:{}>" if marks == "sentinel" else "<reserved0{}>"
    due = [old[form.format(i if marks == "sentinel" else 8194 + i)] for i in range(4)]
    assert found.ids[vocabulary.sentinels.start : vocabulary.sentinels.stop] == due
    for name, mark in (
        ("<racm3:break>", vocabulary.break_),
        ("<eoss>", vocabulary.eoss),
        ("<s>", vocabulary.bos),
        ("<pad>", vocabulary.pad),
        ("</s>", vocabulary.eos),
        ("<unk>", vocabulary.unk),
    ):
        assert names[found.ids[mark]] == name
    assert vocabulary.size == len(names)


def test_text_has_the_same_pieces_under_the_new_ids(tmp_path: Path) -> None:
    content, names = mixed_tokenizer(codes=CODES, marks="reserved", seed=2)
    found = read_named(save(tmp_path / "tokenizer.json", content))
    text = "a strawberry is a sweet red fruit; IMGIMGAZ <racm3:break> </s>"
    ids = found.text.encode(text)
    assert found.text.decode(ids) == text
    assert max(ids) < found.vocabulary.text.size == found.text.vocab_size
    before = [names[found.ids[each]] for each in ids]
    pieces = {number: name for name, number in pico_tokenizer_vocabulary().items()}
    assert before == [pieces[each] for each in pico_tokenizer().encode(text)]
    found.vocabulary.text_id(ids)  # none of them is special


def pico_tokenizer_vocabulary() -> dict[str, int]:
    return json.loads(pico_tokenizer().as_json())["model"]["vocab"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (image_token_name(3), "are not those of codes 0, 1, 2"),
        ("<racm3:break>", "has no <racm3:break>"),
        ("<eoss>", "has no <eoss>"),
        ("<pad>", "has no <pad>"),
        ("<sentinel:", "has no <sentinel:0>, and no <reserved"),
    ],
)
def test_what_is_missing_is_named(spoil: str, message: str, tmp_path: Path) -> None:
    content, _ = mixed_tokenizer(codes=CODES, marks="sentinel", seed=3)
    known = content["model"]["vocab"]
    for name in [name for name in known if name.startswith(spoil)]:
        known[f"x{random.Random(0).random()}{name}"] = known.pop(name)
    content["added_tokens"] = [
        each for each in content["added_tokens"] if not each["content"].startswith(spoil)
    ]
    with pytest.raises(UsageError, match=message):
        read_named(save(tmp_path / "tokenizer.json", content))


def test_ours_is_not_mixed(tmp_path: Path) -> None:
    pico_tokenizer().save(tmp_path / "tokenizer.json")
    assert not has_image_tokens(tmp_path / "tokenizer.json")
    assert pico_vocabulary().size == 322
