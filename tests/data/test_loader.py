import dataclasses
import operator

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_jam.config.data import Cm3Config, DataConfig, DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.data.evaluation import evaluation_samples
from megatron_jam.data.indexed import read_info
from megatron_jam.data.loader import (
    GlobalBatches,
    build_dataset,
    collate,
    global_batch_indices,
    image_tokenizer_of,
)
from megatron_jam.data.mix import mix_of
from megatron_jam.tokenizers.document import answer_mask
from megatron_jam.tokenizers.vocabulary import IMAGE
from tests.data.small import (
    PAD,
    VOCABULARY,
    E,
    make_set,
    pair_documents,
    question_documents,
    text_documents,
)

N = 48


@pytest.fixture
def sets(tmp_path):
    make_set(tmp_path / "text", text_documents(100), kind="text")
    make_set(tmp_path / "pairs", pair_documents(100), kind="pairs")
    make_set(tmp_path / "questions", question_documents(30), kind="interleaved")
    return {
        name: DataSetConfig(name=name, path=str(tmp_path / name))
        for name in ("text", "pairs", "questions")
    }


def build(config, seed=1):
    return build_dataset(config, VOCABULARY, context_length=N, seed=seed)


def equal(a, b):
    arrays = ((each.block.tokens, each.block.runs, each.loss_mask) for each in (a, b))
    numbers = ((each.index, each.dataset, each.dropped, each.pad) for each in (a, b))
    return all(map(np.array_equal, *arrays)) and operator.eq(*numbers)


CONFIGS = {
    "causal": {},
    "cm3": {"objective": "cm3", "cm3": Cm3Config(mean_spans=2, mask_whole_caption=0.1)},
    "documents": {"packing": "documents"},
    "cm3 documents": {"packing": "documents", "objective": "cm3"},
    "answers": {"packing": "documents", "loss_on": "answers"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_samples_are_a_function_of_seed_and_index(sets, name):
    config = DataConfig(sets=list(sets.values()), **CONFIGS[name])
    dataset = build(config)
    samples = [dataset.sample(i) for i in range(60)]
    again, other = build(config), build(config, seed=2)
    for i in np.random.default_rng(0).permutation(60):
        assert equal(again.sample(int(i)), samples[i])
    assert not all(equal(other.sample(i), samples[i]) for i in range(60))
    for sample in samples:
        assert sample.tokens.shape == sample.labels.shape == sample.loss_mask.shape == (N,)
        assert sample.tokens.dtype == sample.labels.dtype == np.int32
        assert sample.loss_mask.dtype == bool
        assert sample.tokens[1:].tolist() == sample.labels[:-1].tolist()
        assert not sample.loss_mask[sample.labels == PAD].any()


def test_stream_predicts_every_token_once(sets):
    dataset = build(DataConfig(sets=[sets["text"]]))
    stream = np.concatenate([dataset.sample(i).tokens for i in range(200)])
    labels = np.concatenate([dataset.sample(i).labels for i in range(200)])
    assert stream[1:].tolist() == labels[:-1].tolist()
    epoch = np.concatenate(text_documents(100))
    assert sorted(stream[: epoch.size].tolist()) == sorted(epoch.tolist())


def test_a_set_keeps_its_samples_when_others_join(sets):
    alone = build(DataConfig(sets=[sets["pairs"]], **CONFIGS["cm3"]))
    blend = build(DataConfig(sets=[sets["text"], sets["pairs"]], **CONFIGS["cm3"]))
    for i in range(40):
        number, local = blend.locate(i)
        if number == 1:
            assert equal(blend.sample(i)._replace(index=local, dataset=0), alone.sample(local))


def test_weights(sets):
    weighted = [
        dataclasses.replace(sets["text"], weight=3.0),
        dataclasses.replace(sets["pairs"], weight=1.0),
    ]
    dataset = build(DataConfig(sets=weighted))
    has_image = [
        bool((VOCABULARY.modality[dataset.sample(i).tokens] == IMAGE).any()) for i in range(40)
    ]
    assert sum(has_image) == 10


def test_answers_only(sets):
    config = DataConfig(sets=[sets["questions"]], packing="documents", loss_on="answers")
    dataset = build(config)
    lengths = [each.size for each in question_documents(30)]
    num_ends = num_counted = index = 0
    while num_ends < 30:  # one epoch
        sample = dataset.sample(index)
        block = np.append(sample.tokens, sample.labels[-1])
        assert sample.loss_mask.tolist() == answer_mask(VOCABULARY, block)[1:].tolist()
        num_ends += int((sample.labels[sample.loss_mask] == E).sum())
        num_counted += int(sample.loss_mask.sum())
        index += 1
    assert num_ends == 30
    num_questions = sum(
        int((~answer_mask(VOCABULARY, each)).sum()) for each in question_documents(30)
    )
    assert num_counted == sum(lengths) - num_questions


def test_answers_only_counts_other_sets_in_full(sets):
    config = DataConfig(
        sets=[sets["questions"], sets["pairs"]], packing="documents", loss_on="answers"
    )
    dataset = build(config)
    for i in range(20):
        sample = dataset.sample(i)
        all_counted = np.array_equal(sample.loss_mask, sample.labels != PAD)
        assert all_counted == (dataset.locate(i)[0] == 1)


def test_refuses_a_set_of_another_vocabulary(sets):
    other = dataclasses.replace(VOCABULARY, bos=3, unk=0)
    with pytest.raises(UsageError, match="another vocabulary"):
        build_dataset(DataConfig(sets=[sets["text"]]), other, context_length=N, seed=0)


def test_refuses_pictures_of_two_image_tokenizers(sets, tmp_path):
    """Equal codes would be different pictures, and nothing else would tell."""
    assert image_tokenizer_of(DataConfig(sets=[sets["text"]])) == ""
    assert image_tokenizer_of(DataConfig(sets=list(sets.values()))) == "1" * 64
    make_set(tmp_path / "new", pair_documents(9), kind="pairs", image_tokenizer="2" * 64)
    new = DataSetConfig(name="new", path=str(tmp_path / "new"))
    assert image_tokenizer_of(DataConfig(sets=[sets["text"], new])) == "2" * 64
    with pytest.raises(UsageError, match=r"/pairs and .*/new were made with different .*1, 2"):
        build(DataConfig(sets=[sets["text"], sets["pairs"], new]))


def global_batch(step, ranks, micro_batch_size):
    """The indices of a step in the order of micro-batches, ranks within."""
    by_rank = [
        global_batch_indices(
            step,
            global_batch_size=72,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        for rank in range(ranks)
    ]
    assert all(len(each) == 72 // ranks // micro_batch_size for each in by_rank)
    return [i for micro in zip(*by_rank, strict=True) for rows in micro for i in rows]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_global_batches_do_not_depend_on_the_layout(ranks, micro_batch_size):
    for step in (0, 1, 7):
        assert global_batch(step, ranks, micro_batch_size) == list(range(72 * step, 72 * step + 72))


def test_micro_batches_of_a_rank():
    indices = global_batch_indices(
        1, global_batch_size=8, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=2
    )
    assert indices == [[10, 11], [14, 15]]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 12), (2, 3), (3, 1)])
def test_workers_and_layout_do_not_change_the_batches(sets, ranks, micro_batch_size, workers):
    """Read in order, and then from a step in the middle as a resumed run does."""
    config = DataConfig(sets=list(sets.values()), **CONFIGS["cm3"])
    dataset = build(config)
    for steps in ((0, 1, 2, 3), (7, 8), (3,)):
        by_rank = [
            GlobalBatches(
                build(config),
                global_batch_size=12,
                micro_batch_size=micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
                workers=workers,
            )
            for rank in range(ranks)
        ]
        for step in steps:
            micro_batches = zip(*(batches(step) for batches in by_rank), strict=True)
            rows = [batch for micro in micro_batches for batch in micro]
            due = collate([dataset.sample(i) for i in range(12 * step, 12 * step + 12)])
            for name, values in due.items():
                assert torch.equal(torch.cat([batch[name] for batch in rows]), values)
        num_dropped = sum(
            dataset.sample(12 * step + i).dropped for step in steps for i in range(12)
        )
        assert sum(batches.num_dropped for batches in by_rank) == num_dropped > 0


def test_an_error_in_a_worker_reaches_the_run(sets):
    class Broken:
        epoch_size = 1

        def sample(self, index):
            raise OSError("the disk is gone")

    batches = GlobalBatches(
        Broken(),
        global_batch_size=1,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    with pytest.raises(OSError, match="the disk is gone"):
        batches(0)


def test_sets_of_unlike_dtypes_blend(tmp_path):
    """And one that another program of Megatron's wrote, in int64."""
    documents = text_documents(50)
    make_set(tmp_path / "narrow", documents)
    make_set(tmp_path / "wide", documents)
    builder = IndexedDatasetBuilder(str(tmp_path / "wide.bin"), dtype=np.int64)
    for each in documents:
        builder.add_document(each, [each.size])
    builder.finalize(str(tmp_path / "wide.idx"))
    sets = [DataSetConfig(name="same", path=str(tmp_path / name)) for name in ("narrow", "wide")]
    for settings in CONFIGS.values():
        narrow, wide = (build(DataConfig(sets=[each], **settings)) for each in sets)
        for i in range(40):
            ours, theirs = narrow.sample(i), wide.sample(i)
            assert equal(ours, theirs)
            assert ours.tokens.dtype == theirs.tokens.dtype == np.int32
    both = build(DataConfig(sets=[sets[0], dataclasses.replace(sets[1], name="other")]))
    assert {both.sample(i).dataset for i in range(10)} == {0, 1}


def test_what_a_run_reads_is_what_it_says(sets):
    config = DataConfig(
        sets=[
            dataclasses.replace(sets["text"], weight=3.0),
            dataclasses.replace(sets["pairs"], weight=1.0),
        ]
    )
    blend = build(config)
    mix = mix_of(config, blend, 1000)
    assert [each.name for each in mix.sets] == ["text", "pairs"]
    assert [each.asked for each in mix.sets] == [0.75, 0.25]
    assert [each.samples for each in mix.sets] == [750, 250]
    counted = np.zeros(3)
    for i in range(1000):
        counted += np.bincount(VOCABULARY.modality[blend.sample(i).tokens], minlength=3)
    for name, share in zip(("text", "image", "special"), counted / counted.sum(), strict=True):
        assert mix.got[name] == pytest.approx(share, abs=0.01)
        assert mix.asked[name] == pytest.approx(mix.got[name], abs=0.01)
    for each, name in zip(mix.sets, ("text", "pairs"), strict=True):
        num_tokens = read_info(sets[name].path).num_tokens
        assert each.epochs == pytest.approx(each.samples * N / num_tokens, rel=0.02)
    assert mix.lines()[0].startswith("data text: 75.00% of the samples (75.00% asked), 750 samples")
    assert len(mix.lines()) == 5


def test_refuses_a_batch_that_does_not_divide():
    with pytest.raises(UsageError, match=r"global_batch_size 8 .* micro_batch_size 3 .* size 2"):
        global_batch_indices(
            0, global_batch_size=8, micro_batch_size=3, data_parallel_rank=0, data_parallel_size=2
        )


def test_collate(sets):
    dataset = build(DataConfig(sets=[sets["pairs"]], packing="documents"))
    samples = [dataset.sample(i) for i in range(3)]
    batch = collate(samples)
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    assert dtypes == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "positions": torch.int64,
        "sets": torch.int64,
    }
    assert batch["sets"].tolist() == [0, 0, 0]
    for row, sample in enumerate(samples):
        assert batch["tokens"][row].tolist() == sample.tokens.tolist()
        assert batch["labels"][row].tolist() == sample.labels.tolist()
        assert batch["loss_mask"][row].tolist() == sample.loss_mask.tolist()
        assert batch["positions"][row].tolist() == list(range(N))


def test_isolated_documents_count_their_own_positions(sets):
    """Also where CM3 has moved a part of a document behind the next one."""
    dataset = build(DataConfig(sets=[sets["pairs"]], objective="cm3"))
    samples = [dataset.sample(i) for i in range(8)]
    batch = collate(samples, isolate_documents=True)
    assert batch["documents"].tolist() == [each.documents[:-1].tolist() for each in samples]
    for row, sample in enumerate(samples):
        seen = {}
        owners = sample.documents.tolist()
        for place, owner in enumerate(owners[:-1]):
            assert batch["positions"][row, place] == seen.setdefault(owner, 0)
            seen[owner] += 1
            counts = sample.loss_mask[place] and owner == owners[place + 1]
            assert batch["loss_mask"][row, place] == counts
    assert any(np.any(np.diff(sample.documents) < 0) for sample in samples)


@pytest.mark.parametrize("context_length", [1, 10, 48, 5000])
def test_evaluation_reads_every_token_once_in_order(sets, context_length):
    samples = evaluation_samples(sets["pairs"].path, VOCABULARY, context_length=context_length)
    stream = np.concatenate(pair_documents(100))
    ends = set(np.cumsum([document.size for document in pair_documents(100)]) - 1)
    lengths = [int(each.loss_mask.sum()) for each in samples]
    # A context that ends within a document could not have reached that document's end.
    for stop, length in zip(np.cumsum(lengths).tolist(), lengths, strict=True):
        reached = {end for end in ends if stop - length < end <= stop - length + context_length}
        assert stop == max(reached, default=stop)
        assert length == context_length or stop in ends
    counted = np.concatenate([each.labels[each.loss_mask] for each in samples])
    assert counted.tolist() == stream[1:].tolist()
    read = np.concatenate([each.tokens[each.loss_mask] for each in samples])
    assert read.tolist() == stream[:-1].tolist()
    assert all(each.tokens.size == context_length for each in samples)
    with pytest.raises(IndexError):
        samples[len(samples)]
