"""A small vocabulary and small sets for the tests of this folder."""

import numpy as np

from megatron_jam.data.indexed import IndexedSet, open_set, write_set
from megatron_jam.tokenizers.document import caption_image_document, question_answer_document
from megatron_jam.tokenizers.vocabulary import JointVocabulary

# Text ids 4-99, picture codes 100-119, <break> 120, <eoss> 121, sentinels 122-131.
VOCABULARY = JointVocabulary.build(text_size=100, num_image_codes=20, num_sentinels=10)
E, B, PAD = VOCABULARY.eos, VOCABULARY.break_, VOCABULARY.pad
CODES_PER_IMAGE = 6


def text_ids(rng, low=1, high=9):
    return rng.integers(4, 100, rng.integers(low, high))


def codes(rng):
    return rng.integers(0, 20, CODES_PER_IMAGE)


def text_documents(num_documents, seed=0):
    rng = np.random.default_rng(seed)
    return [np.append(text_ids(rng), E) for _ in range(num_documents)]


def pair_documents(num_documents, seed=0):
    rng = np.random.default_rng(seed)
    return [
        caption_image_document(VOCABULARY, text_ids(rng), codes(rng)) for _ in range(num_documents)
    ]


def question_documents(num_documents, seed=0):
    rng = np.random.default_rng(seed)
    return [
        question_answer_document(
            VOCABULARY, text_ids(rng), [("text", text_ids(rng)), ("image", codes(rng))]
        )
        for _ in range(num_documents)
    ]


def make_set(prefix, documents, kind="text", image_tokenizer="1" * 64) -> IndexedSet:
    write_set(
        prefix,
        documents,
        vocabulary=VOCABULARY,
        tokenizer_sha256="0" * 64,
        image_tokenizer_sha256="" if kind == "text" else image_tokenizer,
        kind=kind,
    )
    return open_set(prefix, VOCABULARY)
