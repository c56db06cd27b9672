import math

import numpy as np
import pytest

from megatron_jam.config.data import Cm3Config
from megatron_jam.data.cm3 import Cm3Dataset, Cm3Transform, undo_cm3
from megatron_jam.data.cm3_reference import cm3_reference, find_segments
from megatron_jam.data.packing import StreamPacking
from megatron_jam.data.sample import Block
from tests.data.small import (
    PAD,
    VOCABULARY,
    B,
    E,
    make_set,
    pair_documents,
    text_documents,
)

S = [VOCABULARY.sentinel(i) for i in range(10)]
EOSS = VOCABULARY.eoss
MANY = Cm3Config(mean_spans=3.0)


def as_block(tokens, documents=None):
    tokens = np.array(tokens, dtype=np.int32)
    documents = np.zeros(len(tokens)) if documents is None else documents
    return Block.of(tokens, np.array(documents, dtype=np.int32))


def transform(tokens, rng, config=MANY):
    """What becomes of `tokens`: by the reference if the uniform numbers are written down, else by
    C++ with the seed, which the tests below hold equal to the reference."""
    if isinstance(rng, int):
        block = Cm3Transform(VOCABULARY, config)(as_block(tokens), seed=rng, index=0)
    else:
        block = cm3_reference(as_block(tokens), VOCABULARY, config, rng)
    return block.tokens


def undo(tokens, config=MANY):
    return undo_cm3(as_block(tokens), VOCABULARY, config)


def num_spans(tokens):
    return int((np.asarray(tokens) == EOSS).sum())


def spans_of(tokens):
    """The moved spans as (start, end) in the source, read from the result alone."""
    tokens = np.asarray(tokens).tolist()
    spans, start_of_tail = [], tokens.index(S[0], tokens.index(S[0]) + 1)
    tail = tokens[start_of_tail:]
    shift = 0
    for index in range(num_spans(tokens)):
        size = tail.index(EOSS) - 1
        assert tail[0] == S[index]
        tail = tail[size + 2 :]
        start = tokens[:start_of_tail].index(S[index]) + shift
        spans.append((start, start + size))
        shift += size - 1
    assert all(token == PAD for token in tail)
    return spans


# k is 0 below exp(-1), 1 up to 2 exp(-1) = 0.736, 2 up to 0.92.
ONE, TWO = 0.5, 0.8
POISSON_1 = Cm3Config(mean_spans=1.0)


def test_no_span_leaves_the_block():
    tokens = list(range(4, 14))
    result = transform(tokens, iter([0.5, math.exp(-1) - 1e-9]), POISSON_1)
    assert result.tolist() == tokens


def test_one_span_token_by_token():
    # Source 4..10 (7 tokens, 8 edges); ends 0.7 * 8 = 5 and 0.3 * 8 = 2.
    result = transform(range(4, 14), iter([0.5, ONE, 0.7, 0.3]), POISSON_1)
    assert result.tolist() == [4, 5, S[0], 9, 10, S[0], 6, 7, 8, EOSS]


def test_two_spans_token_by_token():
    # Source 4..12 (9 tokens, 10 edges); sorted ends 1, 3 | 5, 9.
    uniforms = iter([0.5, TWO, 0.55, 0.1, 0.99, 0.3])
    result = transform(range(4, 19), uniforms, POISSON_1)
    expected = [4, S[0], 7, 8, S[1], S[0], 5, 6, EOSS, S[1], 9, 10, 11, 12, EOSS]
    assert result.tolist() == expected


def test_an_empty_span_is_drawn_again():
    uniforms = iter([0.5, ONE, 0.3, 0.3, 0.7, 0.3])
    result = transform(range(4, 14), uniforms, POISSON_1)
    assert result.tolist() == [4, 5, S[0], 9, 10, S[0], 6, 7, 8, EOSS]
    assert list(uniforms) == []


@pytest.mark.parametrize(
    ("ends", "moved"),
    [
        ((1, 6), [4, 5, 6]),
        ((2, 7), [5, 6]),  # the first of equals
        ((3, 7), [7, 8]),
        ((0, 5), [4, 5, 6]),
        ((5, 9), [7, 8, 9]),
        ((6, 7), [8]),
        ((8, 11), [10, 11]),
    ],
)
def test_a_span_is_clipped_to_the_segment_of_most_overlap(ends, moved):
    # Segments [1, 4), [5, 8), [9, 11); 11 tokens remain, so 12 edges.
    block = [E, 4, 5, 6, B, 7, 8, 9, E, 10, 11, 12, 13, 14]
    uniforms = iter([0.5, ONE, *((end + 0.5) / 12 for end in ends)])
    result = transform(block, uniforms, POISSON_1).tolist()
    assert result[-len(moved) - 2 :] == [S[0], *moved, EOSS]
    assert undo(result).tolist() == block[:-3]


def test_find_segments():
    block = np.array([E, 4, 5, B, 100, 101, E, E, 6, PAD, 7])
    assert find_segments(block, VOCABULARY).tolist() == [[1, 3], [4, 6], [8, 9], [10, 11]]
    assert find_segments(np.array([E, B]), VOCABULARY).tolist() == []
    assert find_segments(np.array([4, 5]), VOCABULARY).tolist() == [[0, 2]]


def test_a_whole_caption_becomes_the_unconditional_prompt():
    config = Cm3Config(mean_spans=5, mask_whole_caption=1.0)
    block = [E, 4, 5, 6, B, 100, 101, E, 7, 8, 9]
    result = transform(block, 0, config).tolist()
    assert result == [E, S[0], B, 100, 101, E, S[0], 4, 5, 6, EOSS]


def test_which_segments_are_captions():
    # The first may be cut, the second is a picture, the third's picture is cut away, as is
    # the text of a document of its own; only [7, 8] remains.
    config = Cm3Config(mask_whole_caption=1.0)
    block = [4, B, 100, 101, E, E, 7, 8, B, 102, 103, E, 9, 9, E, E, 5, B, 104, 104, E]
    for seed in range(20):
        assert spans_of(transform(block, seed, config)) == [(6, 8)]


def test_each_caption_is_chosen_as_often():
    config = Cm3Config(mask_whole_caption=1.0)
    block = [E, 4, B, 100, E, E, 5, 6, B, 101, E, E, 7, B, 102, E, 8, 8, 8]
    spans = [spans_of(transform(block, seed, config)) for seed in range(3000)]
    counts = [spans.count([span]) for span in ((1, 2), (6, 8), (12, 13))]
    assert sum(counts) == 3000
    assert all(abs(count - 1000) < 4 * math.sqrt(3000 * 2 / 9) for count in counts)


def test_without_a_caption_spans_are_drawn_as_always():
    config = Cm3Config(mask_whole_caption=1.0)
    plain = Cm3Config(mask_whole_caption=0.0)
    for seed in range(20):
        text = range(4, 44)
        assert transform(text, seed, config).tolist() == transform(text, seed, plain).tolist()


@pytest.fixture(scope="module")
def pairs_stream():
    return np.concatenate(pair_documents(60))


def test_chance_of_a_whole_caption(pairs_stream):
    block = pairs_stream[:200]
    for chance in (0.0, 0.1):
        config = Cm3Config(mean_spans=0, mask_whole_caption=chance)
        changed = sum(num_spans(transform(block, seed, config)) for seed in range(4000))
        assert abs(changed - 4000 * chance) <= 4 * math.sqrt(4000 * chance * (1 - chance))


@pytest.mark.parametrize("mean", [0.0, 1.0, 4.0])
def test_number_of_spans_is_poisson_and_capped(pairs_stream, mean):
    # The number drawn is the number made: exactly, not at most.
    config = Cm3Config(mean_spans=mean, max_spans=6)
    draws = 4000
    counts = np.bincount(
        [num_spans(transform(pairs_stream[:300], seed, config)) for seed in range(draws)],
        minlength=7,
    )
    due = np.array([math.exp(-mean) * mean**k / math.factorial(k) for k in range(7)])
    due[6] += 1 - due.sum()
    assert counts.size == 7
    assert np.all(np.abs(counts - draws * due) <= 4 * np.sqrt(draws * due * (1 - due)) + 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ends_are_uniform(k):
    # In one segment nothing is clipped: the 2k ends together are uniform over the edges, and on
    # average each of the 2k + 1 stretches between them is as long as the others.
    config = Cm3Config(mean_spans=k, max_spans=k)
    length = 300
    spans = [
        spans_of(result)
        for seed in range(4000)
        if num_spans(result := transform(np.full(length + 3 * k, 9), seed, config)) == k
    ]
    ends = np.array(spans).reshape(len(spans), 2 * k)
    bins = np.histogram(ends, bins=10, range=(0, length))[0] / ends.size
    assert np.all(np.abs(bins - 0.1) < 5 * math.sqrt(0.09 / ends.size) + 0.002)
    stretches = np.diff(ends, axis=1, prepend=0, append=length).mean(axis=0)
    assert np.all(np.abs(stretches - length / (2 * k + 1)) < 0.04 * length)


def test_lengths_of_a_single_span():
    """Of the n + 1 edges two different ones are the ends: length l has n + 1 - l of the pairs."""
    config = Cm3Config(mean_spans=100, max_spans=1)
    length, draws = 20, 20000
    lengths = [
        end - start
        for seed in range(draws)
        for start, end in spans_of(transform(np.full(length + 3, 9), seed, config))
    ]
    found = np.bincount(lengths, minlength=length + 1)[1:]
    due = np.arange(length, 0, -1) / (length * (length + 1) / 2) * draws
    chi_squared = ((found - due) ** 2 / due).sum()
    assert found.sum() == draws
    assert chi_squared < 49  # passed by one honest run in 5,000, with 19 degrees of freedom


def test_number_of_spans_is_limited_by_the_sentinels(pairs_stream):
    config = Cm3Config(mean_spans=100, max_spans=1000)
    assert num_spans(transform(pairs_stream[:300], 0, config)) == 10


def test_padding_is_used_up_first():
    block = [5, 6, 7, E, PAD, PAD, PAD, PAD]
    for seed in range(50):
        result = transform(block, seed, Cm3Config(mean_spans=1.0, max_spans=1))
        assert result.size == 8
        assert undo(result)[:4].tolist() == block[:4]
        if num_spans(result):
            assert result[-1] == PAD
            assert result[-2] == EOSS


@pytest.mark.parametrize("block", [[], [5], [E, B, E, B, E, B, E], [PAD] * 9, [5, 6, 7]])
def test_a_block_without_room_stays(block):
    block = np.array(block, dtype=np.int64)
    for seed in range(50):
        assert transform(block, seed, Cm3Config(mean_spans=9)).tolist() == block.tolist()


def test_room_for_fewer_spans_than_drawn():
    # 2 tokens of content in 20: at most 2 spans, whatever is drawn, and both are found although
    # uniform ends hardly ever hit them.
    block = [E] * 6 + [5] + [E] * 4 + [6] + [E] * 8
    found = {num_spans(transform(block, seed, Cm3Config(mean_spans=20))) for seed in range(50)}
    assert found == {2}


def test_a_moved_span_stays_of_its_document(tmp_path):
    """So do the sentinels and the <eoss> around it; nothing else changes its document."""
    opened = make_set(tmp_path / "text", text_documents(50))
    packing = StreamPacking(opened, context_length=60, seed=(0, 0))
    moved = 0
    for index in range(40):
        before = packing.block(index)
        after = Cm3Transform(VOCABULARY, MANY)(before, seed=7, index=index)
        tokens, documents = after.tokens.tolist(), after.documents.tolist()
        for number in range(num_spans(tokens)):
            place = tokens.index(S[number])
            start = tokens.index(S[number], place + 1)
            stop = tokens.index(EOSS, start)
            assert len({documents[place], *documents[start : stop + 1]}) == 1
            moved += 1
        source = undo_cm3(after, VOCABULARY, MANY)
        owners = {n: [] for n in set(documents)}
        for token, owner in zip(tokens, documents, strict=True):
            owners[owner] += [token] if token < VOCABULARY.image.start else []
        due = {n: [] for n in owners}
        for token, owner in zip(source.tolist(), before.documents.tolist(), strict=False):
            due[owner] += [token]
        assert {n: sorted(t) for n, t in owners.items()} == {n: sorted(t) for n, t in due.items()}
    assert moved > 40


def test_dataset_is_a_function_of_seed_and_index(tmp_path):
    opened = make_set(tmp_path / "text", text_documents(50))
    packing = StreamPacking(opened, context_length=40, seed=(0, 0))

    def samples(seed, indices):
        dataset = Cm3Dataset(packing, vocabulary=VOCABULARY, config=MANY, seed=seed)
        return {i: dataset.sample(i) for i in indices}

    forward, backward = samples((3, 1), range(30)), samples((3, 1), reversed(range(30)))
    other = samples((4, 1), range(30))
    assert all(np.array_equal(forward[i].tokens, backward[i].tokens) for i in range(30))
    assert any(not np.array_equal(forward[i].tokens, other[i].tokens) for i in range(30))
    for i in range(30):
        sample = forward[i]
        assert sample.tokens.size == sample.labels.size == 40
        assert sample.tokens[1:].tolist() == sample.labels[:-1].tolist()
        assert sample.loss_mask.all()
        assert (sample.index, sample.dataset) == (i, 0)
        source = undo(np.append(sample.tokens, sample.labels[-1]))
        assert sample.dropped == 41 - source.size
        assert source.tolist() == packing.block(i).tokens[: source.size].tolist()
