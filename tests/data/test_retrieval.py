"""Retrieved pairs in front of a pair: which of those that a set holds, drawn anew in each epoch."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_jam.config.data import DataConfig, DataSetConfig, RetrievedConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.data.evaluation import evaluation_samples
from megatron_jam.data.loader import build_dataset
from megatron_jam.data.mix import mix_of
from megatron_jam.data.packing import DocumentPacking, StreamPacking, shuffled
from megatron_jam.data.prepare.choosing import select
from megatron_jam.data.sample import sample_key
from megatron_jam.data.upkeep import merge_sets, verify_set
from megatron_jam.ops.reference import retrieved_in_front
from megatron_jam.tokenizers.document import caption_image_document, caption_image_sequences
from tests.data.small import PAD, VOCABULARY, codes, make_set, pair_documents, text_ids

SEED = (7, 1)
FIXED, DRAWN = RetrievedConfig(most=2), RetrievedConfig(most=2, number="drawn")


def records(count=40, most=5, seed=0):
    """A pair each, and up to `most` retrieved ones."""
    rng = np.random.default_rng(seed)
    pair = lambda: (text_ids(rng), codes(rng))  # noqa: E731
    return [(pair(), [pair() for _ in range(rng.integers(0, most + 1))]) for _ in range(count)]


def write(prefix, made):
    """As the prepare tool does."""
    return make_set(
        prefix, [caption_image_sequences(VOCABULARY, *own, r) for own, r in made], kind="pairs"
    )


def chosen(retrieved, config, key, number):
    return retrieved_in_front(
        retrieved,
        most=config.most,
        is_drawn=config.number == "drawn",
        seed=key,
        document=number,
    )


def epoch_documents(made, config, epoch):
    """What the records are laid out as in an epoch, in the order of the file."""
    key = sample_key((*SEED, epoch))
    return [
        caption_image_document(VOCABULARY, *own, chosen(retrieved, config, key, number))
        for number, (own, retrieved) in enumerate(made)
    ]


def in_order(made, config, epoch):
    laid_out = epoch_documents(made, config, epoch)
    return [laid_out[i] for i in shuffled(len(made), seed=SEED, epoch=epoch)]


@pytest.mark.parametrize("config", [FIXED, DRAWN, RetrievedConfig(most=0)])
@pytest.mark.parametrize("context_length", [3, 64, 500])
def test_stream_of_what_is_drawn_in_each_epoch(tmp_path, config, context_length):
    made = records()
    opened = write(tmp_path / "x", made)
    documents = [each for epoch in range(4) for each in in_order(made, config, epoch)]
    stream = np.concatenate(documents)
    owners = np.repeat(np.arange(len(documents)), [each.size for each in documents])
    packing = StreamPacking(opened, context_length=context_length, seed=SEED, retrieved=config)
    for index in np.random.default_rng(0).permutation((stream.size - 1) // context_length):
        part = slice(index * context_length, (index + 1) * context_length + 1)
        block = packing.block(int(index))
        assert block.tokens.tolist() == stream[part].tolist()
        assert block.documents.tolist() == (owners[part] - owners[part][0]).tolist()
    assert packing.epoch_tokens == sum(each.size for each in epoch_documents(made, config, 0))


@pytest.mark.parametrize("config", [FIXED, DRAWN])
def test_whole_documents_as_they_are_drawn(tmp_path, config):
    """Which of them fit depends on the epoch too."""
    made = records(60)
    opened = write(tmp_path / "x", made)
    packing = DocumentPacking(opened, context_length=30, seed=SEED, pad=PAD, retrieved=config)
    due = []
    for epoch in range(3):
        laid_out = epoch_documents(made, config, epoch)
        fitting = [i for i, each in enumerate(laid_out) if each.size <= 31]
        assert 5 < len(fitting) < 55
        due += [laid_out[fitting[i]] for i in shuffled(len(fitting), seed=SEED, epoch=epoch)]
    found, index = [], 0
    while len(found) < len(due):
        block = packing.block(index)
        numbers = np.unique(block.documents[block.tokens != PAD])
        found += [block.tokens[block.documents == number].tolist() for number in numbers]
        index += 1
    assert found == [each.tolist() for each in due]


def test_lengths_are_drawn_once_an_epoch(tmp_path, monkeypatch):
    asked = []
    opened = write(tmp_path / "x", records())
    packing = StreamPacking(opened, context_length=64, seed=SEED, retrieved=DRAWN)
    drawn = packing._epochs._drawn_lengths
    lengths = packing._epochs._lengths
    monkeypatch.setattr(lengths, "_function", lambda epoch: asked.append(epoch) or drawn(epoch))
    for index in range(int(3.5 * packing.epoch_size)):
        packing.block(index)
    assert asked == [1, 2, 3]  # the first was, to know the set's size


def test_every_number_and_every_choice_is_as_likely(tmp_path):
    """Of three retrieved pairs none, one or two; each of them, and first as often as second."""
    own, *retrieved = [(np.array([4 + i]), np.array([i] * 6)) for i in range(4)]
    opened = write(tmp_path / "x", [(own, retrieved)] * 3000)
    packing = StreamPacking(opened, context_length=64, seed=SEED, retrieved=DRAWN)
    blocks = [packing.block(i) for i in range(int(packing.epoch_size))]
    tokens = np.concatenate([each.tokens[:-1] for each in blocks])
    documents = np.split(tokens, np.flatnonzero(tokens == VOCABULARY.eos)[1::2] + 1)[:-1]
    captions = [each[np.isin(each, range(5, 8))].tolist() for each in documents]
    counts = np.bincount([len(each) for each in captions], minlength=3)
    total = len(captions)
    assert total > 2900
    assert abs(counts - total / 3).max() < 4 * (total * 2 / 9) ** 0.5
    pairs = [tuple(each) for each in captions if len(each) == 2]
    for first in range(5, 8):
        for second in {5, 6, 7} - {first}:
            due = len(pairs) / 6
            assert abs(pairs.count((first, second)) - due) < 4 * due**0.5


def test_all_stand_in_front_unless_a_run_draws(tmp_path):
    """In the order of the set; for Megatron too, to which the file is a row of sequences."""
    made = records()
    opened = write(tmp_path / "x", made)
    due = [caption_image_document(VOCABULARY, *own, retrieved) for own, retrieved in made]
    assert [opened.document(i).tolist() for i in range(40)] == [each.tolist() for each in due]
    packing = StreamPacking(opened, context_length=50, seed=SEED)
    stream = np.concatenate([due[i] for i in shuffled(40, seed=SEED, epoch=0)])
    assert packing.block(2).tokens.tolist() == stream[100:151].tolist()
    theirs = IndexedDataset(str(tmp_path / "x"))
    assert len(theirs.document_indices) == 41
    for number, (first, last) in enumerate(
        zip(theirs.document_indices[:-1], theirs.document_indices[1:], strict=True)
    ):
        joined = np.concatenate([theirs[i] for i in range(first, last)])
        assert joined.tolist() == due[number].tolist()


def test_our_index_of_sequences_is_megatrons(tmp_path):
    made = records()
    opened = write(tmp_path / "x", made)
    theirs = IndexedDatasetBuilder(str(tmp_path / "y.bin"), dtype=opened.dtype.type)
    for own, retrieved in made:
        found = caption_image_sequences(VOCABULARY, *own, retrieved)
        theirs.add_document(np.concatenate(found), [len(each) for each in found])
    theirs.finalize(str(tmp_path / "y.idx"))
    for name in ("bin", "idx"):
        assert (tmp_path / f"x.{name}").read_bytes() == (tmp_path / f"y.{name}").read_bytes()


def test_sets_with_retrieved_pairs_are_verified_merged_and_chosen_from(tmp_path):
    made = records()
    whole = write(tmp_path / "whole", made)
    for number, part in enumerate((made[:7], made[7:])):
        write(tmp_path / f"part{number}", part)
    assert verify_set(tmp_path / "whole", VOCABULARY).num_documents == 40
    merge_sets([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged", VOCABULARY)
    kept = np.arange(40) % 3 > 0
    sequences = np.repeat(kept, whole.sequence_counts)
    select(whole, str(tmp_path / "some"), sequences, VOCABULARY, {})
    write(tmp_path / "expected", [each for each, keep in zip(made, kept, strict=True) if keep])
    for made_as, due in (("merged", "whole"), ("some", "expected")):
        for name in ("bin", "idx"):
            content = (tmp_path / f"{made_as}.{name}").read_bytes()
            assert content == (tmp_path / f"{due}.{name}").read_bytes()
    assert whole.sequences.borders[-1] > 80


def test_a_set_is_measured_with_what_its_settings_draw(tmp_path):
    made = records()
    write(tmp_path / "x", made)
    for config in (None, FIXED, DRAWN):
        samples = evaluation_samples(
            str(tmp_path / "x"), VOCABULARY, context_length=90, retrieved=config
        )
        counted = np.concatenate([each.labels[each.loss_mask] for each in samples])
        documents = [
            caption_image_document(
                VOCABULARY, *own, retrieved if config is None else chosen(retrieved, config, 0, i)
            )
            for i, (own, retrieved) in enumerate(made)
        ]
        assert counted.tolist() == np.concatenate(documents)[1:].tolist()


def test_a_run_says_what_it_reads(tmp_path):
    """An epoch is of what is drawn, not of all that the set holds."""
    made = records()
    opened = write(tmp_path / "x", made)
    config = DataConfig(
        sets=[DataSetConfig(name="x", path=str(tmp_path / "x"), retrieved=RetrievedConfig(most=1))]
    )
    blend = build_dataset(config, VOCABULARY, context_length=20, seed=1)
    due = [own[0].size + 9 + sum(t.size + 8 for t, _ in r) / max(1, len(r)) for own, r in made]
    assert blend.epoch_tokens[0] == pytest.approx(sum(due), rel=0.05)  # captions differ in length
    assert blend.epoch_tokens[0] < 0.6 * opened.num_tokens
    (share,) = mix_of(config, blend, 1000).sets
    assert share.epochs == pytest.approx(1000 * 20 / blend.epoch_tokens[0])


def test_a_cache_knows_what_is_drawn(tmp_path):
    made = records()
    write(tmp_path / "x", made)

    def tokens(retrieved, folder):
        path = {"path": str(tmp_path / "x"), "retrieved": retrieved}
        config = DataConfig(sets=[DataSetConfig(name="x", **path)])
        dataset = build_dataset(config, VOCABULARY, context_length=30, seed=1, index_cache=folder)
        return [dataset.sample(i).tokens.tolist() for i in range(50)]

    settings = (None, FIXED, DRAWN, RetrievedConfig(most=1))
    due = [tokens(each, None) for each in settings]
    for _ in range(2):
        assert [tokens(each, tmp_path / "cache") for each in settings] == due
    assert len({str(each) for each in due}) == 4


def test_what_cannot_be_drawn_is_said(tmp_path):
    opened = make_set(tmp_path / "pairs", pair_documents(9), kind="pairs")
    with pytest.raises(UsageError, match="pairs holds no retrieved pairs"):
        StreamPacking(opened, context_length=5, seed=SEED, retrieved=FIXED)
    with pytest.raises(UsageError, match=r"retrieved\.most must be at least 0, not -1"):
        RetrievedConfig(most=-1)
