"""Perplexities are those of the plain reference on the same tokens, under every layout."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.indexed import write_set
from megatron_jam.evaluation.perplexity import measure_folder, measure_sets
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.document import caption_image_document
from megatron_jam.training.step import ForwardBackward
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import pico_config, pico_folder, pico_tokenizer, pico_vocabulary
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build

LENGTH = 16
LAYOUTS = {
    "one": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(tensor=2), 1),
    "tp4": (ParallelConfig(tensor=4, sequence=True), 1),
    "pp2": (ParallelConfig(pipeline=2), 1),
    "pp2-interleaved": (ParallelConfig(pipeline=2, interleave=2), 1),
    "dp2": (ParallelConfig(), 2),
    "tp2-dp2": (ParallelConfig(tensor=2), 2),
}
VOCABULARY = pico_vocabulary()


def documents(name: str) -> list[np.ndarray]:
    """pairs: captions with pictures. text: another number of tokens, for another last context."""
    rng = np.random.default_rng(5)
    texts = [rng.integers(4, 300, size=rng.integers(3, 12)) for _ in range(13)]
    if name == "text":
        return [np.append(text, VOCABULARY.eos) for text in texts]
    return [caption_image_document(VOCABULARY, text, rng.integers(0, 16, size=4)) for text in texts]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DataSetConfig]]:
    """A JAM-Cross in float64, a set of pairs and one of texts."""
    root = tmp_path_factory.mktemp("evaluation")
    config = pico_config("cross", bias=True, affine_norm=True)
    sets = []
    for name in ("pairs", "text"):
        write_set(
            root / name,
            documents(name),
            vocabulary=VOCABULARY,
            tokenizer_sha256=pico_tokenizer().sha256,
            image_tokenizer_sha256="1" * 64 if name == "pairs" else "",
            kind="pairs" if name == "pairs" else "text",
        )
        sets.append(DataSetConfig(name=name, path=str(root / name)))
    return pico_folder(root / "weights", config), sets


@cache
def direct(path: Path, name: str, isolated: bool = False) -> tuple[list[float], list[int]]:
    """Nats and tokens by modality: whole documents in contexts of at most LENGTH tokens; isolated,
    what a context has of each document is read by itself."""
    folder = WeightsFolder(path)
    weights = {n: folder.read(n) for n in folder.names}
    stream = torch.from_numpy(np.concatenate(documents(name)).astype(np.int64))
    sums, counts = [0.0] * 3, [0] * 3
    ends = (np.cumsum([len(document) for document in documents(name)]) - 1).tolist()
    start = 0
    while start < len(stream) - 1:
        reached = [end for end in ends if start < end <= start + LENGTH]
        stop = max(reached, default=min(start + LENGTH, len(stream) - 1))
        block = stream[start : stop + 1]
        inner = [end + 1 - start for end in ends if start <= end < stop]
        start = stop
        for piece in block.tensor_split(inner) if isolated else [block]:
            if len(piece) < 2:
                continue
            logits = reference_logits(folder.config, weights.__getitem__, piece[None, :-1])[0]
            nats = F.cross_entropy(logits, piece[1:], reduction="none")
            kinds = VOCABULARY.modality[piece[1:].numpy()]
            for kind, value in zip(kinds, nats.tolist(), strict=True):
                sums[kind] += value
                counts[kind] += 1
    assert sum(counts) == len(stream) - (len(ends) if isolated else 1)
    return sums, counts


def measure(
    world: World, path: Path, sets: list[DataSetConfig], micro: int, isolated: bool = False
) -> dict[str, tuple[list[float], list[int], float, dict[str, float]]]:
    folder = WeightsFolder(path)
    step = ForwardBackward(build(folder, world, torch.float64), world, folder.vocabulary)
    settings = {"context_length": LENGTH, "micro_batch_size": micro, "isolate_documents": isolated}
    measured = measure_sets(step, sets, folder, world, **settings)
    return {
        name: (x.sums[0, :3].tolist(), x.counts[0, :3].tolist(), x.mean, x.by_modality())
        for name, x in measured.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference(
    pool: WorkerPool, layout: str, material: tuple[Path, list[DataSetConfig]]
) -> None:
    path, sets = material
    parallel, data = LAYOUTS[layout]
    results = pool.run(measure, parallel, path, sets, 4, data=data)
    assert all(result == results[0] for result in results)  # every rank knows the same
    assert list(results[0]) == ["pairs", "text"]
    for name, (sums, counts, mean, by_modality) in results[0].items():
        due, numbers = direct(path, name)
        assert counts == numbers
        assert sums == pytest.approx(due, rel=1e-9)
        assert mean == pytest.approx(sum(due) / sum(numbers), rel=1e-9)
        kinds = ["text", "image", "special"]
        assert by_modality == pytest.approx(
            {k: s / n for k, s, n in zip(kinds, due, numbers, strict=True) if n}, rel=1e-9
        )
    assert "image" in results[0]["pairs"][3]
    assert "image" not in results[0]["text"][3]


@pytest.mark.parametrize("micro", [1, 3, 50])
def test_micro_batches_do_not_matter(
    pool: WorkerPool, micro: int, material: tuple[Path, list[DataSetConfig]]
) -> None:
    """50 is more than there are contexts: the rest is filled up with nothing."""
    path, sets = material
    (result,) = pool.run(measure, ParallelConfig(), path, sets[1:], micro)
    due, numbers = direct(path, "text")
    assert result["text"][1] == numbers
    assert result["text"][0] == pytest.approx(due, rel=1e-9)


@pytest.mark.parametrize("layout", ["one", "tp4", "pp2-interleaved"])
def test_isolated_documents(
    pool: WorkerPool, layout: str, material: tuple[Path, list[DataSetConfig]]
) -> None:
    path, sets = material
    parallel, data = LAYOUTS[layout]
    result = pool.run(measure, parallel, path, sets, 4, True, data=data)[0]
    for name, (sums, counts, _, _) in result.items():
        due, numbers = direct(path, name, isolated=True)
        assert counts == numbers
        assert sums == pytest.approx(due, rel=1e-9)
        assert sum(counts) < sum(direct(path, name)[1])


def measure_too_long(world: World, path: Path, sets: list[DataSetConfig], length: int) -> None:
    measure_folder(path, sets, world, context_length=length, micro_batch_size=1)


def test_refusals(
    pool: WorkerPool, material: tuple[Path, list[DataSetConfig]], tmp_path: Path
) -> None:
    path, sets = material
    with pytest.raises(RuntimeError, match="UsageError: context_length 65 is longer than max_pos"):
        pool.run(measure_too_long, ParallelConfig(), path, sets, 65)
    one = [np.array([VOCABULARY.eos])]
    write_set(
        tmp_path / "one",
        one,
        vocabulary=VOCABULARY,
        tokenizer_sha256=pico_tokenizer().sha256,
        kind="text",
    )
    short = [DataSetConfig(name="one", path=str(tmp_path / "one"))]
    with pytest.raises(RuntimeError, match="one has less than two tokens"):
        pool.run(measure_too_long, ParallelConfig(), path, short, 8)
