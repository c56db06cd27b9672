import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_jam.config.errors import UsageError
from megatron_jam.data import index_file
from megatron_jam.data.indexed import open_set, read_info, write_set
from megatron_jam.data.upkeep import describe_set, merge_sets, verify_set
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from tests.data.small import VOCABULARY, E, make_set, pair_documents, text_documents


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_merged_sets_are_one_set_of_all_their_documents(tmp_path, monkeypatch, chunk):
    """To the byte."""
    monkeypatch.setattr(index_file, "_CHUNK", chunk)
    documents = pair_documents(60)
    whole = make_set(tmp_path / "whole", documents, kind="pairs")
    parts = [tmp_path / f"part{i}" for i in range(3)]
    for path, first in zip(parts, (0, 1, 40), strict=True):
        last = {0: 1, 1: 40, 40: 60}[first]
        make_set(path, documents[first:last], kind="pairs")
    assert merge_sets(parts, tmp_path / "merged", VOCABULARY) == whole.info
    for name in ("bin", "idx", "json"):
        merged, made = (tmp_path / f"{set_}.{name}" for set_ in ("merged", "whole"))
        assert merged.read_bytes() == made.read_bytes()
    dataset = IndexedDataset(str(tmp_path / "merged"))
    assert [dataset[i].tolist() for i in range(60)] == [each.tolist() for each in documents]


def test_merging_refuses_what_does_not_belong_together(tmp_path):
    make_set(tmp_path / "text", text_documents(5))
    make_set(tmp_path / "pairs", pair_documents(5), kind="pairs")
    make_set(tmp_path / "others", pair_documents(5), kind="pairs", image_tokenizer="2" * 64)
    for a, b, name in (("text", "pairs", "kind"), ("pairs", "others", "image_tokenizer_sha256")):
        with pytest.raises(UsageError, match=rf"/{b} and .*/{a} differ in {name}"):
            merge_sets([tmp_path / a, tmp_path / b], tmp_path / "merged", VOCABULARY)
    for number, settings in enumerate(({"size": 1}, {"size": 2})):
        write_set(
            tmp_path / f"part{number}",
            text_documents(3),
            vocabulary=VOCABULARY,
            tokenizer_sha256="",
            kind="text",
            settings=settings,
        )
    with pytest.raises(UsageError, match=r"differ in settings \({'size': 2}, {'size': 1}\)"):
        merge_sets([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged", VOCABULARY)
    merge_sets([tmp_path / "part1"], tmp_path / "merged", VOCABULARY)
    assert read_info(tmp_path / "merged").settings == {"size": 2}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_merging_notices_a_damaged_part(tmp_path):
    make_set(tmp_path / "part", text_documents(5))
    flip(tmp_path / "part.bin", 3)
    with pytest.raises(UsageError, match=r"part\.bin was damaged"):
        merge_sets([tmp_path / "part"], tmp_path / "merged", VOCABULARY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.bin", "part.idx", "part.json"]


def test_a_whole_set_passes(tmp_path):
    info = make_set(tmp_path / "pairs", pair_documents(50), kind="pairs").info
    assert verify_set(tmp_path / "pairs", VOCABULARY) == info


def test_every_damage_is_found(tmp_path):
    """A bit of any byte of .bin or .idx, wherever it is."""
    make_set(tmp_path / "text", text_documents(4))
    for name in ("bin", "idx"):
        path = tmp_path / f"text.{name}"
        for place in range(path.stat().st_size):
            flip(path, place)
            with pytest.raises(UsageError):
                verify_set(tmp_path / "text", VOCABULARY)
            flip(path, place)
    assert verify_set(tmp_path / "text", VOCABULARY).num_documents == 4


def test_ids_outside_of_the_vocabulary_are_named(tmp_path):
    prefix = tmp_path / "set"
    small = JointVocabulary.build(text_size=100, num_image_codes=5, num_sentinels=2)
    documents = [np.array([5, E]), np.array([6, 7, 115, E]), np.array([5, E])]
    make_set(prefix, documents, kind="pairs")
    for vocabulary, message in (
        (small, r"document 1 has the id 115, outside of the vocabulary's 0\.\.108"),
        (VOCABULARY, "has pictures: say of which image tokenizer"),
    ):
        with pytest.raises(UsageError, match=message):
            describe_set(prefix, vocabulary=vocabulary, tokenizer_sha256="", kind="pairs")


def test_a_set_of_megatrons_is_taken_over(tmp_path):
    """Two sequences a document, in a wider dtype than ours; it then merges with ours."""
    documents = text_documents(20)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int64)
    for each in documents:
        builder.add_document(each, [each.size - 1, 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with pytest.raises(UsageError, match=r"theirs\.json is missing"):
        open_set(tmp_path / "theirs", VOCABULARY)
    info = describe_set(
        tmp_path / "theirs", vocabulary=VOCABULARY, tokenizer_sha256="0" * 64, kind="text"
    )
    assert info == verify_set(tmp_path / "theirs", VOCABULARY)
    theirs = open_set(tmp_path / "theirs", VOCABULARY)
    assert [theirs.document(i).tolist() for i in range(20)] == [d.tolist() for d in documents]
    whole = make_set(tmp_path / "ours", documents).info
    assert dict(vars(info), sha256=0) == dict(vars(whole), sha256=0)
    merged = merge_sets([tmp_path / "theirs"], tmp_path / "merged", VOCABULARY)
    assert dict(vars(merged), sha256=0) == dict(vars(whole), sha256=0)
    assert merged.sha256["bin"] == whole.sha256["bin"]
    again = open_set(tmp_path / "merged", VOCABULARY)
    assert again.sequence_lengths.tolist() == [s for d in documents for s in (d.size - 1, 1)]


def test_numbers_that_are_no_ids_are_refused(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.float32)
    builder.add_document(np.array([1.0, 2.0]), [2])
    builder.finalize(str(tmp_path / "set.idx"))
    with pytest.raises(UsageError, match="float32 numbers, which are no token ids"):
        describe_set(tmp_path / "set", vocabulary=VOCABULARY, tokenizer_sha256="", kind="text")
