"""What counts in instruction tuning: as many supervised ends as there are answers."""

import dataclasses

import numpy as np
import pytest

from megatron_jam.config.data import DataConfig, DataSetConfig
from megatron_jam.data.loader import build_dataset, collate
from megatron_jam.tokenizers.document import conversation_document
from megatron_jam.tokenizers.vocabulary import IMAGE
from tests.data.small import PAD, VOCABULARY, E, codes, make_set, pair_documents, text_ids

N = 120


def conversations(num_documents, seed=0):
    """Conversations of one to four turns, some with pictures, and the number of their answers."""
    rng = np.random.default_rng(seed)
    documents, num_answers = [], 0
    for _ in range(num_documents):
        turns = []
        for _ in range(rng.integers(1, 5)):
            answer = [("text", text_ids(rng))]
            if rng.random() < 0.5:
                answer += [("image", codes(rng)), ("text", text_ids(rng))]
            turns += [[("text", text_ids(rng))], answer]
            num_answers += 1
        documents.append(conversation_document(VOCABULARY, turns))
    return documents, num_answers


@pytest.fixture
def talk(tmp_path):
    documents, num_answers = conversations(60)
    make_set(tmp_path / "talk", documents, kind="interleaved")
    config = DataConfig(
        sets=[DataSetConfig(name="talk", path=str(tmp_path / "talk"))],
        packing="documents",
        loss_on="answers",
    )
    return config, num_answers


def build(config):
    return build_dataset(config, VOCABULARY, context_length=N, seed=1)


@pytest.mark.parametrize("isolate", [False, True])
def test_as_many_supervised_ends_as_answers(talk, isolate):
    config, num_answers = talk
    dataset = build(config)
    found = 0
    for index in range(int(dataset.epoch_size)):
        batch = collate([dataset.sample(index)], isolate_documents=isolate)
        counted = batch["labels"][batch["loss_mask"] > 0]
        found += int((counted == E).sum())
        assert not (counted == PAD).any()
    assert found == num_answers


def test_an_answer_is_learnt_from_its_first_token_to_its_end(tmp_path):
    q, a, r, b = [5, 6], [7, 8, 9], [10], [11, 12]
    turns = [[("text", each)] for each in (q, a, r, b)]
    make_set(tmp_path / "set", [conversation_document(VOCABULARY, turns)], kind="interleaved")
    sets = [DataSetConfig(name="set", path=str(tmp_path / "set"))]
    config = DataConfig(sets=sets, packing="documents", loss_on="answers")
    for isolate in (False, True):
        batch = collate([build(config).sample(0)], isolate_documents=isolate)
        counted = batch["loss_mask"] > 0
        assert batch["labels"][counted].tolist() == [*a, E, *b, E]
        # The token that is read where an answer's first is predicted is the question's end.
        assert batch["tokens"][counted].tolist() == [E, *a, E, *b]


def test_all_tokens_count_by_default(talk):
    config, _ = talk
    dataset = build(dataclasses.replace(config, loss_on="all"))
    for index in range(int(dataset.epoch_size)):
        sample = dataset.sample(index)
        assert sample.loss_mask.tolist() == (sample.labels != PAD).tolist()


def test_a_share_of_pictures_with_captions(talk, tmp_path):
    """They count in full, also where of conversations the answers alone do."""
    config, _ = talk
    make_set(tmp_path / "pairs", pair_documents(80), kind="pairs")
    pairs = DataSetConfig(name="pairs", path=str(tmp_path / "pairs"), weight=0.15)
    talking = dataclasses.replace(config.sets[0], weight=0.85)
    dataset = build(dataclasses.replace(config, sets=[talking, pairs]))
    samples = [dataset.sample(index) for index in range(100)]
    ours = [each for each in samples if each.dataset == 1]
    assert len(ours) == 15
    for each in ours:
        assert each.loss_mask.tolist() == (each.labels != PAD).tolist()
        assert (VOCABULARY.modality[each.labels] == IMAGE).any()
