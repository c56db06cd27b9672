"""How documents are laid out, in training and in generation alike.

With [E] = `</s>`, [B] = `<break>`, T a text and M a picture's codes (CM3leon, figure 9; JAM's
published loader):

    text                T [E]
    caption and image   [E] (T [B] M [B]) x retrieved  T [B] M [E]
    interleaved         [E] T [B] M [B] T ... [E]
    question, answer    [E] question [E] T [B] M [B] T ... [E]
    several turns       [E] question [E] answer [E] question [E] answer [E]

In the last three each M is followed by [B], also one at the end.

Texts come as the text tokenizer's ids, pictures as codes; documents are int64 joint ids [n].
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_jam.tokenizers.vocabulary import IMAGE, TEXT, JointVocabulary

Tokens = NDArray[np.int64]
Part = tuple[Literal["text", "image"], ArrayLike]
"""("text", text ids) or ("image", picture codes)."""


def text_document(vocabulary: JointVocabulary, text: ArrayLike) -> Tokens:
    """`T [E]`."""
    return _join(vocabulary.text_id(text), vocabulary.eos)


def caption_image_document(
    vocabulary: JointVocabulary,
    caption: ArrayLike,
    codes: ArrayLike,
    retrieved: Sequence[tuple[ArrayLike, ArrayLike]] = (),
) -> Tokens:
    """`[E] T [B] M [E]`, with (caption, codes) pairs of `retrieved` documents laid in front."""
    return _join(*caption_image_sequences(vocabulary, caption, codes, retrieved))


def caption_image_sequences(
    vocabulary: JointVocabulary,
    caption: ArrayLike,
    codes: ArrayLike,
    retrieved: Sequence[tuple[ArrayLike, ArrayLike]] = (),
) -> list[Tokens]:
    """The same as `[E]`, each `T [B] M [B]` that was retrieved, and `T [B] M [E]`: with any of the
    retrieved ones left out, or in another order, they are a document too. If there are none, it
    is in one piece."""
    sequences = [_join(vocabulary.eos)]
    for text, image in (*retrieved, (caption, codes)):
        pair = vocabulary.text_id(text), vocabulary.break_, vocabulary.image_id(image)
        sequences.append(_join(*pair, vocabulary.break_))
    sequences[-1][-1] = vocabulary.eos
    return sequences if retrieved else [_join(*sequences)]


def interleaved_document(vocabulary: JointVocabulary, parts: Sequence[Part]) -> Tokens:
    """`[E] T [B] M [B] T ... [E]`. A picture with no text before it gets no [B] in front."""
    return _join(vocabulary.eos, _interleave(vocabulary, parts), vocabulary.eos)


def question_answer_document(
    vocabulary: JointVocabulary, question: ArrayLike, parts: Sequence[Part]
) -> Tokens:
    """`[E] question [E] T [B] M [B] T ... [E]`; ValueError if question or answer is empty, since
    two [E] in a row mark the border of two documents."""
    return conversation_document(vocabulary, [[("text", question)], parts])


def conversation_document(vocabulary: JointVocabulary, turns: Sequence[Sequence[Part]]) -> Tokens:
    """`[E] question [E] answer [E] question [E] answer [E]`, with T [B] M [B] T ... in each turn;
    ValueError if a turn is empty or the last question has no answer."""
    if not turns or len(turns) % 2:
        raise ValueError("the last question has no answer")
    laid_out = [_interleave(vocabulary, parts) for parts in turns]
    for number, turn in enumerate(laid_out):
        if not turn.size:
            raise ValueError(f"the {'answer' if number % 2 else 'question'} is empty")
    return _join(vocabulary.eos, *(each for t in laid_out for each in (t, vocabulary.eos)))


def image_prompt(vocabulary: JointVocabulary, caption: ArrayLike) -> Tokens:
    """`[E] T [B]`: what a picture's codes follow."""
    vocabulary.require_pictures()
    return _join(vocabulary.eos, vocabulary.text_id(caption), vocabulary.break_)


def unconditional_prompt(vocabulary: JointVocabulary) -> Tokens:
    """`[E] <sentinel:0> [B]`: the prompt of classifier-free guidance, its text masked away."""
    vocabulary.require_pictures()
    return _join(vocabulary.eos, vocabulary.sentinel(0), vocabulary.break_)


def question_prompt(vocabulary: JointVocabulary, question: ArrayLike) -> Tokens:
    """`[E] question [E]`: what an answer follows; ValueError if the question is empty."""
    ids = vocabulary.text_id(question)
    if not ids.size:
        raise ValueError("the question is empty")
    return _join(vocabulary.eos, ids, vocabulary.eos)


def answer_mask(vocabulary: JointVocabulary, tokens: ArrayLike) -> NDArray[np.bool_]:
    """True on the tokens of answers and on the [E] that closes each, bool [n].

    `tokens` are whole question-answer documents one after another, starting with one's first [E];
    `[E] q [E] a [E] q [E] a [E]` (several turns) counts too. Only the [E]s are looked at: a
    document starts at an [E] that is first or follows an [E], and in it an answer is what comes
    after an even number (2, 4, ...) of [E]s.
    """
    is_eos = np.asarray(tokens) == vocabulary.eos
    if not is_eos.size:
        return np.zeros(0, dtype=bool)
    num_before = np.cumsum(is_eos) - is_eos  # [E]s strictly before each token
    starts = is_eos & np.concatenate([[True], is_eos[:-1]])
    num_before_document = np.maximum.accumulate(np.where(starts, num_before, 0))
    num_within = num_before - num_before_document
    return (num_within >= 2) & (num_within % 2 == 0)


def split_document(
    vocabulary: JointVocabulary, tokens: ArrayLike
) -> list[tuple[Literal["text", "image"], NDArray[np.int64]]]:
    """The runs of text and of picture in `tokens`, in order, as the text tokenizer's ids and as
    codes; special ids only part them."""
    tokens = np.asarray(tokens, dtype=np.int64)
    modality = vocabulary.modality[tokens]
    parts: list[tuple[Literal["text", "image"], NDArray[np.int64]]] = []
    for run in np.split(tokens, np.flatnonzero(np.diff(modality)) + 1):
        if run.size and vocabulary.modality[run[0]] == TEXT:
            parts.append(("text", run - vocabulary.text.start))
        elif run.size and vocabulary.modality[run[0]] == IMAGE:
            parts.append(("image", vocabulary.image_code(run)))
    return parts


def _interleave(vocabulary: JointVocabulary, parts: Sequence[Part]) -> Tokens:
    pieces: list[ArrayLike] = []
    after_text = False
    for kind, content in parts:
        if kind == "text":
            ids = vocabulary.text_id(content)
            pieces.append(ids)
            after_text = after_text or ids.size > 0
        else:
            pieces += [vocabulary.break_] if after_text else []
            pieces += [vocabulary.image_id(content), vocabulary.break_]
            after_text = False
    return _join(*pieces)


def _join(*pieces: ArrayLike) -> Tokens:
    arrays = [np.atleast_1d(np.asarray(piece, dtype=np.int64)) for piece in pieces]
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])
