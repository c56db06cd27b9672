import json
import struct

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import narrowest_dtype, open_set, write_set
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from tests.data.small import VOCABULARY, E, make_set, pair_documents, text_documents


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "sets" / "pairs.v1"


def test_megatron_reads_what_we_write(prefix):
    documents = pair_documents(20)
    make_set(prefix, documents, kind="pairs")
    dataset = IndexedDataset(str(prefix))
    assert dataset.index.dtype == np.uint8
    assert dataset.document_indices.tolist() == list(range(21))
    assert [dataset[i].tolist() for i in range(20)] == [each.tolist() for each in documents]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
def test_we_read_what_megatron_writes(prefix, dtype):
    documents = pair_documents(20)
    ours = make_set(prefix, documents, kind="pairs")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for each in documents:
        builder.add_document(each - (100 if dtype == np.int8 else 0), [each.size])
    builder.finalize(f"{prefix}.idx")
    theirs = open_set(prefix, VOCABULARY)
    assert theirs.document(3).dtype == dtype
    shift = 100 if dtype == np.int8 else 0
    for number in range(20):
        assert (theirs.document(number) + np.int64(shift)).tolist() == documents[number].tolist()
    assert theirs.num_tokens == ours.num_tokens


def test_opened_set(prefix):
    documents = pair_documents(20)
    opened = make_set(prefix, documents, kind="pairs")
    stream = np.concatenate(documents)
    assert (opened.num_documents, opened.num_tokens) == (20, stream.size)
    assert opened.lengths.tolist() == [each.size for each in documents]
    assert opened.document(7, 2, 5).tolist() == documents[7][2:5].tolist()
    assert opened.document(7, 2, 500).tolist() == documents[7][2:].tolist()
    assert opened.tokens(5, 50).tolist() == stream[5:50].tolist()
    assert not opened.document(0).flags.writeable


def test_description(prefix):
    make_set(prefix, pair_documents(20), kind="pairs")
    num_text = sum(each.size - 3 - 6 for each in pair_documents(20))
    assert json.loads((prefix.parent / "pairs.v1.json").read_text()) == {
        "vocabulary_sha256": VOCABULARY.sha256,
        "tokenizer_sha256": "0" * 64,
        "image_tokenizer_sha256": "1" * 64,
        "kind": "pairs",
        "num_documents": 20,
        "num_tokens": num_text + 20 * 9,
        "tokens_by_modality": {"text": num_text, "image": 20 * 6, "special": 20 * 3},
    }
    names = sorted(path.name for path in prefix.parent.iterdir())
    assert names == ["pairs.v1.bin", "pairs.v1.idx", "pairs.v1.json"]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32), (66052, np.int32)],
)
def test_narrowest_dtype(size, dtype):
    assert narrowest_dtype(size) == dtype


def test_highest_id_of_a_wide_vocabulary_comes_back(prefix):
    vocabulary = JointVocabulary.build(text_size=56320, num_image_codes=9214, num_sentinels=512)
    for size in (vocabulary.size - 512, vocabulary.size):
        document = np.array([5, size - 1, E])
        write_set(prefix, [document], vocabulary=vocabulary, tokenizer_sha256="", kind="text")
        assert open_set(prefix, vocabulary).document(0).tolist() == document.tolist()


def test_a_failure_leaves_the_old_set_whole(prefix):
    documents = text_documents(5)
    make_set(prefix, documents)

    def broken():
        yield documents[0]
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        make_set(prefix, broken())
    assert open_set(prefix, VOCABULARY).num_documents == 5
    assert len(list(prefix.parent.iterdir())) == 3


def test_replaces_an_older_set(prefix):
    make_set(prefix, text_documents(5))
    assert make_set(prefix, text_documents(9, seed=1)).num_documents == 9


@pytest.mark.parametrize("document", [[], [5, 132], [-1, 5]])
def test_refuses_wrong_documents(prefix, document):
    with pytest.raises(ValueError, match=r"document 1 is empty or leaves 0\.\.131"):
        make_set(prefix, [np.array([5, E]), np.array(document, dtype=np.int64)])
    assert not list(prefix.parent.iterdir())


def test_refuses_pictures_of_nobody(prefix):
    with pytest.raises(ValueError, match="has pictures: say of which image tokenizer"):
        make_set(prefix, pair_documents(2), kind="pairs", image_tokenizer="")
    assert not list(prefix.parent.iterdir())


def test_an_older_description_is_to_be_made_again(prefix):
    make_set(prefix, text_documents(5))
    path = prefix.parent / "pairs.v1.json"
    fields = json.loads(path.read_text())
    del fields["image_tokenizer_sha256"]
    path.write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=r"'image_tokenizer_sha256'.*: prepare the set again"):
        open_set(prefix, VOCABULARY)


def test_refuses_to_write_nothing(prefix):
    with pytest.raises(UsageError, match="no document to write"):
        make_set(prefix, [])


def test_refuses_another_vocabulary(prefix):
    make_set(prefix, text_documents(5))
    other = JointVocabulary.build(text_size=100, num_image_codes=21, num_sentinels=10)
    with pytest.raises(UsageError, match="another vocabulary"):
        open_set(prefix, other)


@pytest.mark.parametrize("name", ["bin", "idx", "json"])
def test_refuses_a_missing_file(prefix, name):
    make_set(prefix, text_documents(5))
    path = prefix.parent / f"pairs.v1.{name}"
    path.unlink()
    with pytest.raises(UsageError, match=rf"pairs\.v1\.{name}.* is missing"):
        open_set(prefix, VOCABULARY)


def test_refuses_damaged_files(prefix):
    make_set(prefix, text_documents(50))
    for name, message in (
        ("bin", r"\.bin has \d+ bytes, not \d+"),
        ("idx", "cut short"),
        ("json", "does not describe"),
    ):
        path = prefix.parent / f"pairs.v1.{name}"
        content = path.read_bytes()
        path.write_bytes(content[:-5])
        with pytest.raises(UsageError, match=message):
            open_set(prefix, VOCABULARY)
        path.write_bytes(content)
    (prefix.parent / "pairs.v1.idx").write_bytes(b"\x00" * 100)
    with pytest.raises(UsageError, match="not a Megatron index"):
        open_set(prefix, VOCABULARY)


def test_refuses_a_mismatched_pair(prefix):
    make_set(prefix, text_documents(5))
    make_set(prefix.parent / "other", text_documents(6))
    (prefix.parent / "other.idx").replace(prefix.parent / "pairs.v1.idx")
    with pytest.raises(UsageError, match="differ"):
        open_set(prefix, VOCABULARY)


def test_refuses_a_corrupt_dtype(prefix):
    make_set(prefix, text_documents(5))
    path = prefix.parent / "pairs.v1.idx"
    content = bytearray(path.read_bytes())
    content[17:18] = struct.pack("<B", 99)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="unknown version or dtype"):
        open_set(prefix, VOCABULARY)
