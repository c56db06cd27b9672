import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import TEXT_SPECIALS

TEXTS = ["a strawberry is a sweet red fruit", "a cherry is a small round red fruit"] * 3
TOKENIZER = TextTokenizer.train(TEXTS, vocab_size=290)


def test_ids_of_specials_and_size():
    assert TOKENIZER.vocab_size == 290
    assert [TOKENIZER._tokenizer.token_to_id(token) for token in TEXT_SPECIALS] == [0, 1, 2, 3]


def test_merges_are_learnt():
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert TOKENIZER.decode(TOKENIZER.encode(TEXTS[0])) == TEXTS[0]


def test_training_is_reproducible():
    assert TextTokenizer.train(TEXTS, vocab_size=290).sha256 == TOKENIZER.sha256
    assert TextTokenizer.train(TEXTS[:1], vocab_size=290).sha256 != TOKENIZER.sha256


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_string_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(4 <= i < TOKENIZER.vocab_size for i in ids)


@pytest.mark.parametrize("special", TEXT_SPECIALS)
def test_specials_in_a_text_stay_text(special):
    text = f"a{special}b {special} {special}"
    for tokenizer in (TOKENIZER, TextTokenizer.train([text] * 9, vocab_size=300)):
        ids = tokenizer.encode(text)
        assert min(ids) >= 4
        assert tokenizer.decode(ids) == text


def test_specials_in_a_text_stay_text_after_loading(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == TOKENIZER.sha256
    assert loaded.vocab_size == 290
    assert loaded.encode("red </s> fruit") == TOKENIZER.encode("red </s> fruit")
    assert 2 not in loaded.encode("red </s> fruit")


def test_decoding_leaves_specials_out():
    assert TOKENIZER.decode([2, *TOKENIZER.encode("red"), 1, 2]) == "red"


def test_half_a_character_decodes_to_the_replacement_mark():
    assert TOKENIZER.decode(TOKENIZER.encode("\N{STRAWBERRY}")[:2]) == "\N{REPLACEMENT CHARACTER}"


def test_refuses_a_vocabulary_without_room_for_bytes():
    with pytest.raises(UsageError, match="vocab_size must be at least 260, not 259"):
        TextTokenizer.train(TEXTS, vocab_size=259)


def test_refuses_other_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UsageError, match="no tokenizer at"):
        TextTokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="is not a tokenizer"):
        TextTokenizer.load(path)
