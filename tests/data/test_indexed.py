import json
import struct

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_jam.config.errors import UsageError
from megatron_jam.data import index_file
from megatron_jam.data.index_file import TokenWriter, file_sha256, read_index
from megatron_jam.data.indexed import SetWriter, narrowest_dtype, open_set, write_set
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


DTYPES = [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64]


@pytest.mark.parametrize("dtype", [*DTYPES, np.float32, np.float64])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_our_files_are_megatrons_byte_for_byte(tmp_path, monkeypatch, dtype, chunk):
    """The .idx, written in chunks, too; and Megatron reads them."""
    monkeypatch.setattr(index_file, "_CHUNK", chunk)
    documents = [each.astype(dtype) for each in text_documents(30)]
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    ours = TokenWriter(tmp_path / "ours", dtype)
    for each in documents:
        theirs.add_document(each, [each.size])
        ours.add(each)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    sha256 = ours.finish()
    for name, path in ours.paths.items():
        content = path.rename(tmp_path / f"ours.{name}").read_bytes()
        assert content == (tmp_path / f"theirs.{name}").read_bytes()
        assert sha256[name] == file_sha256(tmp_path / f"ours.{name}")
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[i].tolist() for i in range(30)] == [each.tolist() for each in documents]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".bin", ".idx", ".idx"]


def test_documents_of_several_sequences(tmp_path):
    """Megatron's sets may have them, with a mode for each sequence; a document is their union."""
    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.uint16, multimodal=True)
    builder.add_document(np.arange(9), [4, 5], [0, 1])
    builder.add_document(np.arange(9, 12), [3], [0])
    builder.finalize(str(tmp_path / "set.idx"))
    index = read_index(tmp_path / "set")
    assert (index.starts.tolist(), index.lengths.tolist()) == ([0, 9], [9, 3])


@pytest.mark.parametrize("dtype", DTYPES)
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
    assert opened.all_tokens.tolist() == stream.tolist()
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
        "sha256": {name: file_sha256(f"{prefix}.{name}") for name in ("bin", "idx")},
        "settings": {},
    }
    names = sorted(path.name for path in prefix.parent.iterdir())
    assert names == ["pairs.v1.bin", "pairs.v1.idx", "pairs.v1.json"]


@pytest.mark.parametrize(
    ("text", "image", "dtype_of_texts", "dtype_of_pairs"),
    [
        (100, 20, np.uint8, np.uint16),
        (200, 8192, np.uint8, np.uint16),
        (256, 65024 - 256, np.uint8, np.uint16),  # 65,536 ids in all
        (257, 65024 - 256, np.uint16, np.int32),
        (56320, 9214, np.uint16, np.int32),  # the paper's 66,048
        (65536, 8192, np.uint16, np.int32),
        (65537, 8192, np.int32, np.int32),
    ],
)
def test_narrowest_dtype_that_holds_the_ids(prefix, text, image, dtype_of_texts, dtype_of_pairs):
    vocabulary = JointVocabulary.build(text_size=text, num_image_codes=image, num_sentinels=510)
    for kind, dtype, highest in (
        ("text", dtype_of_texts, vocabulary.text.stop - 1),
        ("pairs", dtype_of_pairs, vocabulary.size - 1),
    ):
        assert narrowest_dtype(vocabulary, kind) == dtype
        document = np.array([5, highest, E])
        write_set(prefix, [document], vocabulary=vocabulary, tokenizer_sha256="", kind=kind)
        opened = open_set(prefix, vocabulary)
        assert opened.dtype == dtype
        assert opened.document(0).tolist() == document.tolist()


def test_a_text_set_refuses_what_its_dtype_does_not_hold(prefix):
    vocabulary = JointVocabulary.build(text_size=200, num_image_codes=100, num_sentinels=10)
    with pytest.raises(ValueError, match=r"document 0 leaves 0\.\.255"):
        write_set(
            prefix, [np.array([5, 256])], vocabulary=vocabulary, tokenizer_sha256="", kind="text"
        )


def test_many_documents_in_a_call(prefix):
    documents = text_documents(30)
    expected = make_set(prefix, documents).info
    with writer(prefix) as built:
        built.add(documents[0])
        built.add(np.concatenate(documents[1:20]), np.array([len(d) for d in documents[1:20]]))
        built.add(np.concatenate(documents[20:]), np.array([len(d) for d in documents[20:]]))
        assert built.finish() == expected
    with writer(prefix) as cut:
        cut.add(np.array([5, 6, E]), np.array([2, 2]))
        with pytest.raises(ValueError, match="3 tokens for lengths of 4 in all"):
            cut.finish()
    with writer(prefix) as empty:
        empty.add(np.array([5, E]))
        with pytest.raises(ValueError, match="document 3 is empty"):
            empty.add(np.array([5, 6, E]), np.array([1, 2, 0]))
    assert open_set(prefix, VOCABULARY).info == expected
    assert len(list(prefix.parent.iterdir())) == 3


def writer(prefix):
    return SetWriter(prefix, vocabulary=VOCABULARY, tokenizer_sha256="0" * 64, kind="text")


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


@pytest.mark.parametrize(
    ("document", "message"),
    [([], "is empty"), ([5, 132], r"leaves 0\.\.131"), ([-1, 5], r"leaves 0\.\.131")],
)
def test_refuses_wrong_documents(prefix, document, message):
    with pytest.raises(ValueError, match=f"document 1 {message}"):
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
    (prefix.parent / "other.idx").rename(prefix.parent / "pairs.v1.idx")
    with pytest.raises(UsageError, match="cut short or of another set"):
        open_set(prefix, VOCABULARY)
    (prefix.parent / "other.bin").rename(prefix.parent / "pairs.v1.bin")
    with pytest.raises(UsageError, match=r"\.idx and .*\.json differ"):
        open_set(prefix, VOCABULARY)


def test_refuses_a_corrupt_dtype(prefix):
    make_set(prefix, text_documents(5))
    path = prefix.parent / "pairs.v1.idx"
    content = bytearray(path.read_bytes())
    content[17:18] = struct.pack("<B", 99)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="unknown version or dtype"):
        open_set(prefix, VOCABULARY)
