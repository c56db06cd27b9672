"""The C++ of the CM3 objective against its reference, in every scope."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jam.config.data import Cm3Config
from megatron_jam.data.cm3 import Cm3Transform, undo_cm3
from megatron_jam.data.cm3_reference import cm3_reference, cm3_uniforms
from megatron_jam.data.packing import StreamPacking
from megatron_jam.data.sample import Block
from tests.data.small import PAD, VOCABULARY, B, E, make_set, text_documents

S = [VOCABULARY.sentinel(i) for i in range(10)]
EOSS = VOCABULARY.eoss
SCOPES = ("block", "authors", "document")


def documents_of(tokens):
    """Numbers that change behind each </s> that is not a document's first token, and at padding."""
    tokens = np.asarray(tokens, dtype=np.int64)
    if not tokens.size:
        return np.zeros(0, dtype=np.int32)
    before = np.concatenate([[PAD], tokens[:-1]])
    begins = (before == E) | ((tokens == PAD) != (before == PAD))
    return (np.cumsum(begins) - begins[0]).astype(np.int32)


def block_of(tokens):
    return Block.of(np.array(tokens, dtype=np.int32), documents_of(tokens))


def both(block, config, seed, index):
    """What C++ makes of the block, which is what the reference makes of it."""
    made = Cm3Transform(VOCABULARY, config)(block, seed=seed, index=index)
    due = cm3_reference(block, VOCABULARY, config, cm3_uniforms(seed, index))
    assert made.tokens.tolist() == due.tokens.tolist()
    assert made.dropped == due.dropped
    if made.tokens is not block.tokens:
        assert made.documents.tolist() == due.documents.tolist()
        assert made.tokens.dtype == made.documents.dtype == np.int32
    return made


SETTINGS = {
    "seed": st.integers(0, 2**63 - 1),
    "index": st.integers(0, 2**63 - 1),
    "config": st.builds(
        Cm3Config,
        scope=st.sampled_from(SCOPES),
        mean_spans=st.floats(0, 30),
        max_spans=st.integers(1, 40),
        mask_whole_caption=st.floats(0, 1),
    ),
}
DATA = st.sampled_from([E, B, PAD, 4, 5, 50, 99, 100, 119])
ANY = st.integers(-300, 300) | st.integers(-(2**31), 2**31 - 1)


def runs_of(tokens):
    return st.lists(st.tuples(tokens, st.integers(1, 12)), max_size=20).map(
        lambda runs: [token for token, size in runs for _ in range(size)]
    )


@settings(max_examples=300, deadline=None)
@given(tokens=runs_of(DATA), **SETTINGS)
def test_any_block_any_settings(tokens, seed, index, config):
    block = block_of(tokens)
    original = block.tokens.copy()
    made = both(block, config, seed, index)
    assert block.tokens.tolist() == original.tolist()
    assert made.tokens.size == block.tokens.size == made.documents.size
    # Undoing gives the source: the block without padding, cut by what had to make room.
    content = without_padding(block.tokens)
    source = content[: content.size - made.dropped]
    assert undo_cm3(made, VOCABULARY, config).tolist() == without_padding(source).tolist()
    num_added = 3 * int((made.tokens == EOSS).sum())
    assert made.dropped == max(0, content.size + num_added - block.tokens.size)
    check_spans(made, config)


def without_padding(tokens):
    return np.trim_zeros(tokens - PAD, "b") + PAD


def check_spans(made, config):
    """Sentinels count from 0 in each piece, each twice; no span is empty or holds a border."""
    borders = {B, PAD} if config.scope == "authors" else {B, PAD, E}
    cuts = np.flatnonzero(np.diff(made.documents)) + 1 if config.scope == "document" else []
    for piece in np.split(made.tokens, cuts):
        ends = np.flatnonzero(piece == EOSS).tolist()
        places = np.flatnonzero(np.isin(piece, S)).tolist()
        assert piece[places].tolist() == S[: len(ends)] * 2
        assert len(ends) <= min(config.max_spans, 10)
        for start, end in zip(places[len(ends) :], ends, strict=True):
            span = piece[start + 1 : end].tolist()
            assert span
            assert not borders & set(span)
        assert all(a < b for a, b in pairwise(ends))


@settings(max_examples=100, deadline=None)
@given(
    tokens=runs_of(ANY), dtype=st.sampled_from([np.int8, np.int16, np.int32, np.int64]), **SETTINGS
)
def test_any_numbers_whatever(tokens, dtype, seed, index, config):
    """Sentinels and ids outside of the vocabulary, which no set holds: still as the reference."""
    if config.mask_whole_caption:  # the reference looks every id up, and there it is an error
        config = Cm3Config(scope=config.scope, mean_spans=config.mean_spans)
    made = both(block_of(tokens), config, seed, index)
    assert made.tokens.size == len(tokens)


# k is 0 below exp(-1), 1 up to 2 exp(-1) = 0.736.
ONE = 0.5


def test_the_authors_scope_crosses_documents_but_no_break():
    # Read are 10 tokens, so 11 edges; the span [1, 9) is clipped to [3, 9), over the two </s>.
    block = block_of([E, 4, B, 6, 7, E, E, 8, 9, 10, 11, 12, 13])
    config = Cm3Config(scope="authors")
    ends = [1.5 / 11, 9.5 / 11]
    made = cm3_reference(block, VOCABULARY, config, iter([0.5, ONE, *ends]))
    assert made.tokens.tolist() == [E, 4, B, S[0], 10, S[0], 6, 7, E, E, 8, 9, EOSS]
    # Each token keeps its document; the sentinels take the first's, <eoss> the last's.
    assert made.documents.tolist() == [0, 1, 1, 1, 3, 1, 1, 1, 1, 2, 3, 3, 3]
    block_scope = cm3_reference(block, VOCABULARY, Cm3Config(), iter([0.5, ONE, *ends]))
    assert block_scope.tokens.tolist() == [E, 4, B, S[0], E, E, 8, 9, 10, S[0], 6, 7, EOSS]


def test_each_document_has_spans_of_its_own_before_its_end():
    # 8 tokens, then 4, the last of which is not read: 15 - (5 + 3) - 3 = 4 are left for it.
    block = Block.of(
        np.array([4, 5, 6, 7, E, 8, 9, 10, 11, 12, 13, 14, 15, 16, E], dtype=np.int32),
        np.repeat(np.array([0, 1], dtype=np.int32), [5, 10]),
    )
    config = Cm3Config(scope="document")
    uniforms = iter([0.5, ONE, 1.5 / 6, 3.5 / 6, 0.5, ONE, 1.5 / 5, 2.5 / 5])
    made = cm3_reference(block, VOCABULARY, config, uniforms)
    first = [4, S[0], 7, S[0], 5, 6, EOSS, E]
    second = [8, S[0], 10, 11, S[0], 9, EOSS]
    assert made.tokens.tolist() == first + second
    assert made.documents.tolist() == [0] * 8 + [1] * 7
    assert made.dropped == 6
    assert list(uniforms) == []


@pytest.mark.parametrize("scope", SCOPES)
def test_real_sets_in_every_scope(tmp_path, scope):
    """The stream has no padding, so every span costs three tokens."""
    opened = make_set(tmp_path / "text", text_documents(300))
    packing = StreamPacking(opened, context_length=400, seed=(0, 0))
    config = Cm3Config(scope=scope, mean_spans=0.5)
    num_spans = 0
    for index in range(25):
        made = both(packing.block(index), config, 9, index)
        ends = int((made.tokens == EOSS).sum())
        assert made.dropped == 3 * ends
        num_spans += ends
    assert num_spans > 3


def test_number_of_spans_of_each_document_is_poisson():
    config = Cm3Config(scope="document", mean_spans=1.0)
    block = block_of(([5] * 30 + [E]) * 3 + [6] * 120)
    transform = Cm3Transform(VOCABULARY, config)
    draws = 3000
    due = np.exp(-1) / np.array([1, 1, 2, 6, 24])
    due = np.append(due, 1 - due.sum()) * draws
    for number in range(3):
        found = np.zeros(6)
        for seed in range(draws):
            made = transform(block, seed=seed, index=0)
            found[min(5, int((made.tokens[made.documents == number] == EOSS).sum()))] += 1
        assert ((found - due) ** 2 / due).sum() < 23  # one honest run in 3,000 is above


def test_refuses_arrays_that_do_not_fit():
    transform = Cm3Transform(VOCABULARY, Cm3Config())
    block = block_of([4, 5, 6])
    for runs in ([[0, 2]], [[0, 4]], [[0, 3], [1, 3]], [[0, 2], [0, 3]], [[0, 4], [1, 3]], [], [3]):
        wrong = np.array(runs, dtype=np.int32)
        with pytest.raises(ValueError, match="tokens must be a row, and runs"):
            transform(block._replace(runs=wrong), seed=0, index=0)
    with pytest.raises(TypeError):  # nothing is converted silently
        transform(block._replace(tokens=block.tokens.astype(np.int64)), seed=0, index=0)
    with pytest.raises(TypeError):
        transform(block._replace(runs=block.runs.astype(np.int64)), seed=0, index=0)
    with pytest.raises(TypeError):
        transform(block._replace(tokens=np.repeat(block.tokens, 2)[::2]), seed=0, index=0)
