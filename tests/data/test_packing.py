import logging
import math

import numpy as np
import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.data.index_cache import IndexCache
from megatron_jam.data.packing import DocumentPacking, StreamPacking, shuffled
from megatron_jam.tokenizers.document import caption_image_document
from tests.data.small import PAD, VOCABULARY, E, codes, make_set, text_documents, text_ids

SEED = (7, 1)
NUM_EPOCHS = 5


@pytest.fixture
def documents():
    return text_documents(40)


@pytest.fixture
def opened(tmp_path, documents):
    return make_set(tmp_path / "text", documents)


def in_order(documents, seed=SEED):
    """The documents of NUM_EPOCHS epochs in a row, the slow and plain way."""
    for epoch in range(NUM_EPOCHS):
        yield from (documents[i] for i in shuffled(len(documents), seed=seed, epoch=epoch))


def test_shuffled_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = [
        shuffled(40, seed=seed, epoch=epoch).tolist()
        for seed in ((7, 1), (7, 2), (8, 1))
        for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    # Frozen: a change of the order would change every run that is resumed.
    assert shuffled(8, seed=(7, 1), epoch=0).tolist() == [1, 3, 2, 7, 4, 5, 0, 6]


# Shorter than a document, about a document, many, almost an epoch.
@pytest.mark.parametrize("context_length", [1, 3, 16, 64, 190])
def test_stream_is_the_concatenation_cut_into_slices(opened, documents, context_length):
    stream = np.concatenate(list(in_order(documents)))
    packing = StreamPacking(opened, context_length=context_length, seed=SEED)
    num_blocks = (stream.size - 1) // context_length
    assert num_blocks * context_length > 3 * opened.num_tokens
    for index in range(num_blocks):
        start = index * context_length
        block = packing.block(index).tokens
        assert block.dtype == np.int32
        assert block.tolist() == stream[start : start + context_length + 1].tolist()


def test_refuses_a_set_with_less_than_a_block(opened):
    """Else a sample would hold a document twice."""
    size = opened.num_tokens
    assert StreamPacking(opened, context_length=size - 1, seed=SEED).block(0).tokens.size == size
    with pytest.raises(UsageError, match=rf"text has {size} tokens, less than a sample of context"):
        StreamPacking(opened, context_length=size, seed=SEED)


def make_packing(kind, opened, seed=SEED):
    if kind == "stream":
        return StreamPacking(opened, context_length=32, seed=seed)
    return DocumentPacking(opened, context_length=32, seed=seed, pad=PAD)


@pytest.mark.parametrize("kind", ["stream", "documents"])
def test_random_access_equals_sequential(opened, kind):
    sequential = make_packing(kind, opened)
    blocks = [sequential.block(index).tokens for index in range(60)]
    for index in np.random.default_rng(0).permutation(60):
        fresh = make_packing(kind, opened)
        assert fresh.block(int(index)).tokens.tolist() == blocks[index].tolist()
    jumping = make_packing(kind, opened)
    for index in np.random.default_rng(1).permutation(60):
        assert jumping.block(int(index)).tokens.tolist() == blocks[index].tolist()


@pytest.mark.parametrize("kind", ["stream", "documents"])
def test_another_seed_gives_another_order(opened, kind):
    one, other = make_packing(kind, opened), make_packing(kind, opened, seed=(7, 2))
    assert one.block(0).tokens.tolist() != other.block(0).tokens.tolist()


@pytest.mark.parametrize("context_length", [8, 9, 32, 100, 1000])
def test_documents_are_packed_greedily(opened, documents, context_length):
    packing = DocumentPacking(opened, context_length=context_length, seed=SEED, pad=PAD)
    expected = []
    for epoch in range(NUM_EPOCHS):
        blocks = [[]]
        for number in shuffled(len(documents), seed=SEED, epoch=epoch):
            if len(blocks[-1]) + documents[number].size > context_length + 1:
                blocks.append([])
            blocks[-1].extend(documents[number].tolist())
        expected += [block + [PAD] * (context_length + 1 - len(block)) for block in blocks]
    assert [packing.block(index).tokens.tolist() for index in range(len(expected))] == expected
    ends = sum(block.count(E) for block in expected)
    assert ends == NUM_EPOCHS * len(documents)


def test_longer_documents_are_left_out_and_counted(opened, documents, caplog):
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        packing = DocumentPacking(opened, context_length=5, seed=SEED, pad=PAD)
    logger.removeHandler(caplog.handler)
    fitting = sorted(each.tolist() for each in documents if each.size <= 6)
    assert f"{40 - len(fitting)} of 40 documents are longer than context_length 5" in caplog.text
    found, index = [], 0
    while len(found) < len(fitting):
        content = [token for token in packing.block(index).tokens.tolist() if token != PAD]
        ends = [i + 1 for i, token in enumerate(content) if token == E]
        assert ends[-1] == len(content)
        pieces = zip([0, *ends], ends, strict=False)
        found += [content[start:end] for start, end in pieces]
        index += 1
    assert sorted(found) == fitting


def test_refuses_a_context_that_holds_no_document(opened):
    with pytest.raises(UsageError, match="longer than context_length 0"):
        DocumentPacking(opened, context_length=0, seed=SEED, pad=PAD)


def test_a_document_as_long_as_the_block_fits(tmp_path):
    document = np.append(np.arange(4, 12), E)
    packing = DocumentPacking(
        make_set(tmp_path / "one", [document]), context_length=8, seed=SEED, pad=PAD
    )
    assert packing.block(0).tokens.tolist() == packing.block(5).tokens.tolist() == document.tolist()


def test_blocks_number_their_documents(opened, documents):
    """In a stream the first may have begun before the block; padding has a number of its own."""
    packing = DocumentPacking(opened, context_length=60, seed=SEED, pad=PAD)
    for index in range(5):
        block = packing.block(index)
        ends = np.flatnonzero(block.tokens == E)
        expected = np.searchsorted(ends, np.arange(61))
        assert len(ends) > 1
        assert block.documents.tolist() == expected.tolist()
        assert set(block.documents[block.tokens == PAD]) <= {len(ends)}
    stream = StreamPacking(opened, context_length=60, seed=SEED)
    for index in range(5):
        block = stream.block(index)
        ends = np.flatnonzero(block.tokens == E)
        assert block.documents.tolist() == np.searchsorted(ends, np.arange(61)).tolist()


@pytest.mark.parametrize("kind", ["stream", "documents"])
def test_an_epoch_has_the_size_it_says(opened, documents, kind):
    """Every token of the set is read in that many blocks, and not in one less."""
    packing = make_packing(kind, opened)

    def num_ends(size):
        tokens = [packing.block(index).tokens for index in range(size)]
        # A stream's block has one token more than is its own.
        return sum(int((each[: 32 if kind == "stream" else 33] == E).sum()) for each in tokens)

    assert num_ends(math.ceil(packing.epoch_size)) >= len(documents)
    assert num_ends(math.ceil(packing.epoch_size) - 1) < len(documents)
    if kind == "stream":
        assert packing.epoch_size == opened.num_tokens / 32


def test_retrieved_documents_stay_with_theirs(tmp_path):
    """Packed by documents, whole; isolated, as one document."""
    rng = np.random.default_rng(0)
    documents = [
        caption_image_document(
            VOCABULARY, text_ids(rng), codes(rng), [(text_ids(rng), codes(rng))] * 2
        )
        for _ in range(30)
    ]
    opened = make_set(tmp_path / "pairs", documents, kind="pairs")
    packing = DocumentPacking(opened, context_length=120, seed=SEED, pad=PAD)
    found = []
    for index in range(int(packing.epoch_size)):
        block = packing.block(index)
        for number in range(block.documents.max() + 1):
            found.append(block.tokens[block.documents == number].tolist())
    whole = [each for each in found if PAD not in each]
    assert sorted(whole) == sorted(each.tolist() for each in documents)


@pytest.mark.parametrize("kind", ["stream", "documents"])
def test_a_cache_changes_nothing_but_who_computes(opened, documents, tmp_path, monkeypatch, kind):
    folder = tmp_path / "cache"

    def blocks(seed=SEED, documents=opened, length=32):
        cache = {"cache": IndexCache(folder), "seed": seed, "context_length": length}
        if kind == "stream":
            packing = StreamPacking(documents, **cache)
        else:
            packing = DocumentPacking(documents, pad=PAD, **cache)
        return [packing.block(index).tokens.tolist() for index in range(60)]

    plain = make_packing(kind, opened)
    due = [plain.block(index).tokens.tolist() for index in range(60)]
    assert blocks() == due
    names = sorted(path.name for path in folder.iterdir())
    assert all(name.endswith((".numbers.npy", ".ends.npy")) for name in names)
    monkeypatch.setattr("megatron_jam.data.packing.shuffled", None)  # not called again
    assert blocks() == due
    monkeypatch.undo()
    # Another seed, and another set of as many documents, have files of their own.
    assert blocks(seed=(7, 2)) != due
    other = make_set(tmp_path / "other", [each[-3:] for each in documents])
    assert blocks(documents=other) != due
    assert len(list(folder.iterdir())) > 2 * len(names)


def test_a_cache_that_cannot_be_written_is_done_without(opened, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    logger.addHandler(caplog.handler)
    packing = StreamPacking(
        opened, context_length=32, seed=SEED, cache=IndexCache(tmp_path / "file" / "cache")
    )
    due = make_packing("stream", opened).block(3).tokens.tolist()
    assert packing.block(3).tokens.tolist() == due
    logger.removeHandler(caplog.handler)
    assert "is not used as a cache" in caplog.text


def test_a_killed_writer_leaves_no_array_that_is_read(tmp_path):
    """The first array is there, the second is not: both are made again."""
    cache = IndexCache(tmp_path)
    made = cache.arrays(("key",), ("a", "b"), lambda: (np.arange(3), np.arange(4)))
    next(tmp_path.glob("*.b.npy")).unlink()
    again = cache.arrays(("key",), ("a", "b"), lambda: (np.arange(3), np.arange(4)))
    assert [each.tolist() for each in again] == [each.tolist() for each in made]
    assert len(list(tmp_path.iterdir())) == 2
