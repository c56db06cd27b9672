"""The state of a document while it is written."""

import itertools

import numpy as np
import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.generation.row import Legal, Row, Rules, codes_left, legal_table
from megatron_jam.tokenizers.document import (
    caption_image_document,
    image_prompt,
    interleaved_document,
    question_answer_document,
    question_prompt,
    unconditional_prompt,
)
from tests.generation.scenes import TOKENS_PER_IMAGE, VOCABULARY

CODES = np.arange(TOKENS_PER_IMAGE)
TEXT = np.arange(10, 14)
EOS, BREAK = VOCABULARY.eos, VOCABULARY.break_
CODE = VOCABULARY.image.start
PARTS = {"t": ("text", TEXT), "i": ("image", CODES)}


def rules(**changes: int) -> Rules:
    settings = {"tokens_per_image": TOKENS_PER_IMAGE, "max_positions": 64, "max_new_tokens": 50}
    return Rules(vocabulary=VOCABULARY, **{**settings, **changes})


def walk(document: np.ndarray) -> list[int | None]:
    """What :func:`codes_left` must say behind each token of a document, told from its front."""
    states: list[int | None] = []
    state: int | None = None
    for token in document:
        if token == BREAK:
            state = None if state == 0 else TOKENS_PER_IMAGE
        elif VOCABULARY.modality[token] == 1:
            # A picture without text before it has no <break> in front.
            state = (TOKENS_PER_IMAGE if state is None else state) - 1
        elif token == EOS:
            state = None
        states.append(state)
    return states


@pytest.mark.parametrize("layout", ["t", "ti", "tit", "titi", "i", "it", "tiit", "iti"])
@pytest.mark.parametrize("with_question", [True, False])
def test_every_cut_of_every_layout(layout: str, with_question: bool) -> None:
    parts = [PARTS[letter] for letter in layout]
    document = (
        question_answer_document(VOCABULARY, TEXT, parts)
        if with_question
        else interleaved_document(VOCABULARY, parts)
    )
    for length, state in enumerate(walk(document), start=1):
        assert codes_left(VOCABULARY, document[:length], TOKENS_PER_IMAGE) == state


def test_every_cut_with_retrieved_documents() -> None:
    document = caption_image_document(VOCABULARY, TEXT, CODES, [(TEXT, CODES), (TEXT, CODES)])
    states = [codes_left(VOCABULARY, document[:n], 5) for n in range(1, len(document) + 1)]
    assert states == walk(document)
    assert states.count(TOKENS_PER_IMAGE) == 3


def test_prompts_begin_where_their_layout_says() -> None:
    assert codes_left(VOCABULARY, question_prompt(VOCABULARY, TEXT), 5) is None
    assert codes_left(VOCABULARY, image_prompt(VOCABULARY, TEXT), 5) == 5
    assert codes_left(VOCABULARY, unconditional_prompt(VOCABULARY), 5) == 5
    assert codes_left(VOCABULARY, np.array([BREAK]), 5) == 5


def test_legal_table() -> None:
    table = legal_table(VOCABULARY)
    assert table.shape == (4, VOCABULARY.size)
    assert np.flatnonzero(table[Legal.TEXT]).tolist() == [EOS, *range(4, 300)]
    added = table[Legal.TEXT_OR_BREAK] & ~table[Legal.TEXT]
    assert np.flatnonzero(added).tolist() == [BREAK]
    assert np.flatnonzero(table[Legal.CODE]).tolist() == list(range(300, 316))
    assert np.flatnonzero(table[Legal.BREAK]).tolist() == [BREAK]


def test_a_picture_has_its_codes_and_its_break() -> None:
    row = Row(rules(), question_prompt(VOCABULARY, TEXT), index=0)
    assert row.legal is Legal.TEXT_OR_BREAK
    row.push(BREAK)
    for _ in range(TOKENS_PER_IMAGE):
        assert row.in_picture
        assert row.legal is Legal.CODE
        row.push(CODE)
    assert not row.in_picture
    assert row.legal is Legal.BREAK
    row.push(BREAK)
    assert row.legal is Legal.TEXT_OR_BREAK
    row.push(EOS)
    assert row.done
    assert row.new_tokens.tolist() == [BREAK, *[CODE] * 5, BREAK, EOS]


def test_unconditional_stream_is_one_token_behind() -> None:
    row = Row(rules(), image_prompt(VOCABULARY, TEXT), index=0)
    begin = [EOS, VOCABULARY.sentinel(0)]
    assert row.unconditional == begin
    row.push(CODE + 3)
    assert row.unconditional == [*begin, BREAK]
    row.push(CODE + 2)
    assert row.unconditional == [*begin, BREAK, CODE + 3]
    assert Row(rules(), question_prompt(VOCABULARY, TEXT), index=0).unconditional == begin


def test_max_new_tokens_ends_text_but_no_picture() -> None:
    row = Row(rules(max_new_tokens=2), np.array([EOS]), index=0)
    row.push(10)
    assert not row.done
    row.push(11)
    assert row.done
    row = Row(rules(max_new_tokens=2), np.array([EOS]), index=0)
    for token in [10, BREAK, *[CODE] * 5]:
        row.push(token)
        assert not row.done
    row.push(BREAK)
    assert row.done


def test_a_picture_begins_only_where_it_fits() -> None:
    row = Row(rules(max_positions=10), np.array([EOS, 10, 11]), index=0)
    assert row.legal is Legal.TEXT_OR_BREAK  # 3 + <break> + 5 codes + <break> = 10
    for token in [BREAK, *[CODE] * 5, BREAK]:
        row.push(token)
    assert row.done
    row = Row(rules(max_positions=10), np.array([EOS, 10, 11, 12]), index=0)
    for token in range(10, 16):
        assert row.legal is Legal.TEXT
        assert not row.done
        row.push(token)
    assert row.done


def test_wrong_prompts_are_refused() -> None:
    prompts = {
        "prompt 7 is empty": [],
        "ids beyond": [EOS, VOCABULARY.size],
        "6 picture codes in a row": [EOS, BREAK, *[CODE] * 6],
        "needs room for 1 more": [EOS, *[10] * 63],
        "needs room for 6 more": [EOS, *[10] * 57, BREAK],
    }
    for message, prompt in prompts.items():
        with pytest.raises(UsageError, match=message):
            Row(rules(), np.array(prompt, dtype=np.int64), index=7)
    for num_text, num_codes in itertools.product([56], [0, 1, 5]):  # these just fit
        prompt = [EOS, *[10] * num_text, BREAK, *[CODE] * num_codes]
        assert not Row(rules(), np.array(prompt), index=0).done
