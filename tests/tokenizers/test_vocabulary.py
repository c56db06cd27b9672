import dataclasses
import json

import numpy as np
import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.vocabulary import IMAGE, SPECIAL, TEXT, IdRange, JointVocabulary

VOCABULARY = JointVocabulary.build(text_size=10, num_image_codes=4, num_sentinels=3)


def test_layout():
    expected = JointVocabulary(
        size=19,
        text=IdRange(0, 10),
        image=IdRange(10, 4),
        sentinels=IdRange(16, 3),
        bos=0,
        pad=1,
        eos=2,
        unk=3,
        break_=14,
        eoss=15,
    )
    assert expected == VOCABULARY
    modalities = [SPECIAL] * 4 + [TEXT] * 6 + [IMAGE] * 4 + [SPECIAL] * 5
    assert VOCABULARY.modality.dtype == np.int8
    assert VOCABULARY.modality.tolist() == modalities


def test_modality_of_the_papers_file():
    # 65,536 ids of which 1,024 have no name, then <break>, <eoss> and 514 sentinels.
    vocabulary = JointVocabulary(
        size=66052,
        text=IdRange(0, 56320),
        image=IdRange(56320, 8192),
        sentinels=IdRange(65538, 514),
        bos=0,
        pad=1,
        eos=2,
        unk=3,
        break_=65536,
        eoss=65537,
    )
    assert np.bincount(vocabulary.modality).tolist() == [56316, 8192, 4 + 1024 + 2 + 514]


def test_an_llms_own_vocabulary_has_no_pictures(tmp_path):
    vocabulary = JointVocabulary.build(text_size=10, num_image_codes=0, num_sentinels=3)
    assert (vocabulary.size, vocabulary.sentinels.size) == (10, 0)
    assert (vocabulary.break_, vocabulary.eoss) == (-1, -1)
    assert vocabulary.modality.tolist() == [SPECIAL] * 4 + [TEXT] * 6
    vocabulary.save(tmp_path / "vocabulary.json")
    assert JointVocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    with pytest.raises(UsageError, match="no picture codes"):
        vocabulary.image_id([0])
    with pytest.raises(UsageError, match="image needs ids break_ and eoss"):
        dataclasses.replace(vocabulary, size=14, image=IdRange(10, 4))


def test_ids_of_codes_texts_and_sentinels():
    assert VOCABULARY.image_id([0, 3]).tolist() == [10, 13]
    assert VOCABULARY.image_code(VOCABULARY.image_id(np.arange(4))).tolist() == [0, 1, 2, 3]
    assert VOCABULARY.image_id(2) == 12
    assert VOCABULARY.text_id([4, 9]).tolist() == [4, 9]
    assert [VOCABULARY.sentinel(i) for i in range(3)] == [16, 17, 18]


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("image_id", 4),
        ("image_id", -1),
        ("image_code", 9),
        ("image_code", 14),
        ("text_id", [5, 2]),
        ("text_id", 10),
        ("sentinel", 3),
    ],
)
def test_refuses_ids_of_another_kind(method, value):
    with pytest.raises(ValueError, match=r"special id|not within|not one of"):
        getattr(VOCABULARY, method)(value)


def test_saves_and_loads(tmp_path):
    path = tmp_path / "folder" / "vocabulary.json"
    VOCABULARY.save(path)
    loaded = JointVocabulary.load(path)
    assert loaded == VOCABULARY
    assert loaded.sha256 == VOCABULARY.sha256
    assert isinstance(loaded.image, IdRange)
    assert [file.name for file in path.parent.iterdir()] == ["vocabulary.json"]


def test_hash_tells_vocabularies_apart():
    other = dataclasses.replace(VOCABULARY, break_=15, eoss=14)
    assert len(VOCABULARY.sha256) == 64
    assert other.sha256 != VOCABULARY.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 18}, "sentinels"),
        ({"image": IdRange(9, 4)}, "overlap"),
        ({"eoss": 14}, "repeat"),
        ({"eoss": 11}, "image or sentinels"),
        ({"sentinels": IdRange(16, 0)}, "sentinels"),
    ],
)
def test_refuses_impossible_layouts(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(VOCABULARY, **change)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"size": 3}', '{"size": "x"}'])
def test_refuses_other_files(tmp_path, content):
    path = tmp_path / "vocabulary.json"
    with pytest.raises(UsageError, match="no vocabulary at"):
        JointVocabulary.load(path)
    path.write_text(content)
    with pytest.raises(UsageError, match="is not a vocabulary"):
        JointVocabulary.load(path)


def test_refuses_an_unknown_field(tmp_path):
    path = tmp_path / "vocabulary.json"
    VOCABULARY.save(path)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "eot": 4}))
    with pytest.raises(UsageError, match="eot"):
        JointVocabulary.load(path)
