import numpy as np
import pytest

from megatron_jam.tokenizers import document
from megatron_jam.tokenizers.vocabulary import JointVocabulary

# Text ids 4-9, picture codes 10-13 (codes 0-3), <break> 14, <eoss> 15, sentinels 16-18.
VOCABULARY = JointVocabulary.build(text_size=10, num_image_codes=4, num_sentinels=3)
E, B = 2, 14


def check(tokens, expected):
    assert tokens.dtype == np.int64
    assert tokens.tolist() == expected


def test_text():
    check(document.text_document(VOCABULARY, [5, 6]), [5, 6, E])


def test_caption_image():
    tokens = document.caption_image_document(VOCABULARY, [5, 6], [3, 0])
    check(tokens, [E, 5, 6, B, 13, 10, E])


def test_caption_image_with_retrieved_documents():
    retrieved = [([7], [1, 1]), ([8, 9], [2, 2])]
    tokens = document.caption_image_document(VOCABULARY, [5], np.array([3, 0]), retrieved)
    check(tokens, [E, 7, B, 11, 11, B, 8, 9, B, 12, 12, B, 5, B, 13, 10, E])


def test_three_retrieved_documents_make_seven_breaks_and_two_ends():
    tokens = document.caption_image_document(VOCABULARY, [5], [0], [([5], [0])] * 3).tolist()
    assert (tokens.count(B), tokens.count(E)) == (7, 2)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("text", [5])], [E, 5, E]),
        ([("text", [5]), ("image", [0, 1]), ("text", [6])], [E, 5, B, 10, 11, B, 6, E]),
        ([("text", [5]), ("image", [0])], [E, 5, B, 10, B, E]),
        ([("image", [0]), ("text", [5])], [E, 10, B, 5, E]),
        ([("image", [0]), ("image", [1])], [E, 10, B, 11, B, E]),
        ([("text", [5]), ("text", [6]), ("image", [2])], [E, 5, 6, B, 12, B, E]),
        ([("text", [5]), ("text", []), ("image", [2])], [E, 5, B, 12, B, E]),
    ],
)
def test_interleaved(parts, expected):
    check(document.interleaved_document(VOCABULARY, parts), expected)


def test_question_answer():
    parts = [("text", [7]), ("image", [2, 3]), ("text", [8])]
    tokens = document.question_answer_document(VOCABULARY, [5, 6], parts)
    check(tokens, [E, 5, 6, E, 7, B, 12, 13, B, 8, E])


def test_prompts_are_the_beginnings_of_documents():
    check(document.image_prompt(VOCABULARY, [5, 6]), [E, 5, 6, B])
    check(document.question_prompt(VOCABULARY, [5, 6]), [E, 5, 6, E])
    check(document.unconditional_prompt(VOCABULARY), [E, 16, B])
    pair = document.caption_image_document(VOCABULARY, [5, 6], [1])
    assert pair[:4].tolist() == document.image_prompt(VOCABULARY, [5, 6]).tolist()


def test_refuses_specials_in_texts_and_codes_outside():
    with pytest.raises(ValueError, match="special id"):
        document.text_document(VOCABULARY, [5, E])
    with pytest.raises(ValueError, match="text ids"):
        document.image_prompt(VOCABULARY, [B])
    with pytest.raises(ValueError, match="picture codes"):
        document.caption_image_document(VOCABULARY, [5], [4])
    with pytest.raises(ValueError, match="question is empty"):
        document.question_prompt(VOCABULARY, [])
    with pytest.raises(ValueError, match="answer is empty"):
        document.question_answer_document(VOCABULARY, [5], [("text", [])])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([E, 5, 6, E, 7, B, 12, B, 8, E], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
        # Two documents, then padding.
        ([E, 5, E, 7, E, E, 6, E, 8, 9, E, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0]),
        # Two turns.
        ([E, 5, E, 7, E, 6, E, 8, E, 1], [0, 0, 0, 1, 1, 0, 0, 1, 1, 0]),
        # The last document cut within its answer.
        ([E, 5, E, 7, E, E, 5, E, 7, 7], [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]),
        # No question: nothing is an answer.
        ([E, 5, B, 12, E, E, 5, B, 12, E], [0] * 10),
    ],
)
def test_answer_mask(tokens, expected):
    mask = document.answer_mask(VOCABULARY, tokens)
    assert mask.dtype == bool
    assert mask.astype(int).tolist() == expected


@pytest.mark.parametrize("parts", [[("text", [7])], [("image", [1])], [("image", [1])] * 3])
def test_one_supervised_end_for_each_answer(parts):
    one = document.question_answer_document(VOCABULARY, [5, 6], parts)
    tokens = np.concatenate([one] * 7)
    mask = document.answer_mask(VOCABULARY, tokens)
    assert (tokens[mask] == E).sum() == 7
    assert mask[: len(one)].tolist() == [False] * 4 + [True] * (len(one) - 4)


def test_split_document():
    parts = [("text", [7]), ("image", [2, 3]), ("image", [0, 1]), ("text", [8, 9])]
    tokens = document.question_answer_document(VOCABULARY, [5, 6], parts)
    found = [(k, v.tolist()) for k, v in document.split_document(VOCABULARY, tokens)]
    assert found == [("text", [5, 6]), *parts]
    assert document.split_document(VOCABULARY, [E, B, 16, 1]) == []
    assert document.split_document(VOCABULARY, []) == []
