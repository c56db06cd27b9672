"""Reading samples and building indexes over Megatron-Core's data path; one thread.

Samples are of 4,097 tokens from documents of 1,000 tokens on average, which stand shuffled; they
are read one after the other, as in training, from a file in memory. A sample of ours is what
_query_document_sample_shuffle_indices gives, int32 tokens and their documents; with its labels and
loss mask it is what __getitem__ gives, and batches of samples are what a training step is given:
GPTDataset's through torch's default_collate. Indexes are of ten million documents.
"""

import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, _IndexWriter
from megatron.core.datasets.utils import Split
from torch.utils.data import default_collate

from benchmarks.timing import seconds, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.data.index_file import TokenWriter, read_index
from megatron_jam.data.indexed import IndexedSet, open_set, write_set
from megatron_jam.data.loader import collate
from megatron_jam.data.packing import DocumentPacking, StreamPacking
from megatron_jam.data.sample import CausalDataset, Sample
from megatron_jam.tokenizers.vocabulary import JointVocabulary

LENGTH, DOCUMENTS = 4_096, 20_000
BATCH = 4
MANY = 10_000_000
Make = Callable[[range], object]
VOCABULARY = JointVocabulary.build(text_size=56_320, num_image_codes=8_192, num_sentinels=512)


def main(*, pairs: PositiveInt = 9, samples: PositiveInt = 2_000, json: bool = False) -> None:
    """Print ratios, the peer's seconds over ours, and the seconds of ours for all indexes.

    Args:
        pairs: how often each is run.
        samples: samples that a run of the peer reads; one of ours reads 6 or 12 times as many.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _samples(f"{folder}/set", pairs, samples, json)
        _indexes(Path(folder), json)


def _samples(prefix: str, pairs: int, samples: int, json: bool) -> None:
    rng = np.random.default_rng(0)
    documents = (rng.integers(4, 50_000, rng.integers(500, 1_500)) for _ in range(DOCUMENTS))
    write_set(prefix, documents, vocabulary=VOCABULARY, tokenizer_sha256="", kind="text")
    opened = open_set(prefix, VOCABULARY)
    ours = CausalDataset(
        StreamPacking(opened, context_length=LENGTH, seed=(0,)), pad=VOCABULARY.pad
    )
    theirs = _gpt_dataset(prefix)
    query = theirs._query_document_sample_shuffle_indices
    starts = range(0, min(len(theirs), int(ours.epoch_size)) - BATCH, BATCH)

    def run(make: Make, starts: Iterator[int], count: int) -> None:
        for start in itertools.islice(starts, count):
            make(range(start, start + BATCH))

    rows: list[tuple[str, Make, Make, int]] = [
        (
            "sample over GPTDataset._query_document_sample_shuffle_indices",
            lambda numbers: [ours.sample(number) for number in numbers],
            lambda numbers: [query(number) for number in numbers],
            6,
        ),
        (
            "sample with labels and mask over GPTDataset.__getitem__",
            lambda numbers: [_with_labels(ours.sample(number)) for number in numbers],
            lambda numbers: [theirs[number] for number in numbers],
            12,
        ),
        (
            f"batch of {BATCH} over GPTDataset's and default_collate",
            lambda numbers: collate([ours.sample(number) for number in numbers]),
            lambda numbers: default_collate([theirs[number] for number in numbers]),
            6,
        ),
    ]
    for name, ours_make, theirs_make, work in rows:
        count = samples // BATCH
        mine = partial(run, ours_make, itertools.cycle(starts), work * count)
        other = partial(run, theirs_make, itertools.cycle(starts), count)
        speed_over(name, mine, other, pairs=pairs, work=work).print(as_json=json)


def _with_labels(sample: Sample) -> tuple[np.ndarray, ...]:
    return sample.tokens, sample.labels, sample.loss_mask


def _gpt_dataset(prefix: str) -> GPTDataset:
    tokenizer = SimpleNamespace(eod=2, pad=1, vocab_size=50_000, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=LENGTH,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        split="1,0,0",
    )
    numbers = np.arange(DOCUMENTS, dtype=np.int32)
    return GPTDataset(IndexedDataset(prefix), prefix, numbers, None, Split.train, config)


def _indexes(folder: Path, json: bool) -> None:
    """Documents of one token each in the file; their lengths in the index do not matter here."""
    lengths = np.ones(MANY, dtype=np.int32)

    def write_theirs() -> None:
        with _IndexWriter(str(folder / "theirs.idx"), DType.dtype_from_code(8)) as writer:
            writer.write(lengths.tolist(), None, range(MANY + 1))

    writer = TokenWriter(folder / "ours", np.uint16)
    writer.add(np.zeros(MANY, dtype=np.uint16), lengths)
    written = seconds(writer.finish)
    for name, path in writer.paths.items():
        path.rename(folder / f"ours.{name}")
    taken = {"write .idx": written}
    start = time.perf_counter()
    opened = IndexedSet(str(folder / "ours"), None, read_index(folder / "ours"))  # type: ignore[arg-type]
    taken["open"] = time.perf_counter() - start
    taken["stream"] = seconds(lambda: StreamPacking(opened, context_length=64, seed=(0,)).block(0))
    taken["whole documents"] = seconds(
        lambda: DocumentPacking(opened, context_length=64, seed=(0,), pad=1).block(0)
    )
    theirs = seconds(write_theirs)
    same = (folder / "ours.idx").read_bytes() == (folder / "theirs.idx").read_bytes()
    assert same, "the two programs wrote different indexes"
    print_indexes(taken, theirs / written, json)


def print_indexes(taken: dict[str, float], ratio: float, json: bool) -> None:
    """Seconds of each step, their sum, and Megatron's time to write the same .idx over ours."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = {**taken, "all": sum(taken.values()), "Megatron's writer over ours": ratio, "GB": peak}
    for name, value in rows.items():
        text = f"indexes of {MANY} documents, {name}: {value:.2f}"
        print(f'{{"name": "{name}", "value": {value:.3f}}}' if json else text, flush=True)


if __name__ == "__main__":
    run_command(main)
