"""Fusion over mergekit and over `cp`, on two parents of 1 GB in bf16 that are made on the spot.

Needs mergekit 0.1.4 in the environment, which wants another version of some packages than the tests
do: give it an environment of its own, with this project's dependencies. Certificates are not
timed, hashes are; a fusion hashes and writes on a second core, and on the first where it is ahead.
"""

import multiprocessing
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from immutables import Map
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.linear import LinearMergeTask
from mergekit.options import MergeOptions

from benchmarks.convert import anonymous_bytes
from benchmarks.timing import Row, Run, row, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig, TowerConfig
from megatron_jam.fusion.blocks import average, held
from megatron_jam.fusion.fuse import Fusion
from megatron_jam.models.parameters import num_parameters, parameter_table
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary
from megatron_jam.weights.folder import FolderWriter
from megatron_jam.weights.hf_export import export_hugging_face

SIDE = 4096
WIDTH, FFN, TEXT_IDS = 2048, 5504, 20_000
ALLOWED = 100e6
PAUSE_SECONDS = 0.002
BLOCK_BYTES = 1 << 18
PARENTS = ("text", "image")
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "width copy": {"method": "width", "fill": "copy"},
    "width average": {"method": "width", "fill": "average"},
    "width diagonal": {"method": "width", "fill": "diagonal"},
    "cross": {"method": "cross"},
    "cross separate": {"method": "cross", "tables": "per_tower", "head": "wide"},
}
ROWS = ["average", *METHODS]


def main(
    *,
    gigabytes: float = 1.0,
    pairs: int = 5,
    rows: list[str] = ROWS,
    folder: Path = Path("/dev/shm"),
    json: bool = False,
) -> None:
    """Measure the computation, whole fusions of every method, and the memory of all.

    Args:
        gigabytes: size of a parent, in 1e9 bytes.
        pairs: how often each is measured.
        rows: which, of `average`, `uniform`, `width copy`, `width average`, `width diagonal`,
            `cross` and `cross separate`.
        folder: where the parents are made and removed again; in memory, or the disk is measured.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    torch.set_num_threads(1)
    if unknown := set(rows) - set(ROWS):
        raise UsageError(f"no row {min(unknown)!r}; choose of {ROWS}")
    if "average" in rows:
        found = speed_over("average over LinearMergeTask", *computations(), pairs=5 * pairs)
        found.print(as_json=json)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        for each in (name for name in rows if name in METHODS):
            if not (root / PARENTS[0]).exists():
                config = parents(root, gigabytes * 1e9)
            for found in measured(root, config, each, pairs):
                found.print(as_json=json)


def measured(root: Path, config: ModelConfig, name: str, pairs: int) -> Iterator[Row]:
    """Speed and memory of one way to fuse."""
    settings = METHODS[name]
    ours = fused(root, **settings)
    fresh, again = removed(root / "child"), removed(root / "copy")
    if name == "uniform":
        peers = removed(root / "merged")
        for parent in PARENTS:
            export_hugging_face(root / parent, root / f"hf_{parent}")
        yield speed_over(
            f"{name} over mergekit-yaml",
            ours,
            merged(root),
            pairs=pairs,
            before=(fresh, peers),
            warm=1,
        )
        for folder in ("merged", *(f"hf_{parent}" for parent in PARENTS)):
            removed(root / folder)()
    fresh()
    ours()
    yield speed_over(
        f"{name} over cp", ours, copied(root), pairs=pairs, before=(fresh, again), warm=1
    )
    again()
    allowed = 0.05 * 2 * 2 * num_parameters(config) + ALLOWED
    found = [peak_memory(root, settings) / allowed for _ in range(2)]
    yield row(f"{name}: peak memory over the allowed", found)


def removed(path: Path) -> Run:
    """Away with a folder of the last run: whose pages the kernel takes back is not measured."""
    return lambda: shutil.rmtree(path, ignore_errors=True)


def computations() -> tuple[Run, Run]:
    """Both averages of two tensors, ours and mergekit's."""
    a, b = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    references = [ModelReference.parse(name) for name in PARENTS]
    task = LinearMergeTask.model_construct(
        gather_tensors=None,
        tensor_parameters=ImmutableMap({r: Map({"weight": 0.5}) for r in references}),
        normalize=True,
        weight_info=WeightInfo(name="layer.weight"),
    )
    tensors = dict(zip(references, (a, b), strict=True))

    mean, step = average(held(a), held(b), 0.5), BLOCK_BYTES // (2 * SIDE)
    assert SIDE % step == 0, "the buffer is always full"
    out = torch.empty(step, SIDE, dtype=a.dtype)

    def ours() -> None:
        """Some rows after others into one buffer, which stays in the cache; a fusion's buffers are
        larger, as fewer calls make up for the cache when others write and hash them."""
        for start in range(0, SIDE, step):
            mean.fill(out, start, start + step)

    return ours, lambda: task.execute(tensors)


def parents(root: Path, num_bytes: float) -> ModelConfig:
    """Two Llamas as weights folders."""
    source = root / "tokenizer"
    TextTokenizer.train(["a b c"], vocab_size=300).save(source / TOKENIZER_FILE)
    vocabulary = JointVocabulary.build(text_size=TEXT_IDS, num_image_codes=16, num_sentinels=14)
    vocabulary.save(source / VOCABULARY_FILE)
    config = llama(vocabulary.size, 1)
    per_layer = 2 * (num_parameters(llama(vocabulary.size, 2)) - num_parameters(config))
    config = llama(vocabulary.size, round((num_bytes - 2 * num_parameters(config)) / per_layer) + 1)
    shapes = {entry.name: entry.shape for entry in parameter_table(config)}
    for seed, name in enumerate(PARENTS):
        generator = torch.Generator().manual_seed(seed)
        with FolderWriter(
            root / name, config=config, source=source, shapes=shapes, dtype=torch.bfloat16
        ) as writer:
            for each, shape in shapes.items():
                writer.write(each, torch.randn(shape, generator=generator) * 0.02)
            writer.finish({"made_by": "benchmarks/fuse.py"})
    return config


def llama(vocabulary: int, layers: int) -> ModelConfig:
    """A Llama of some layers."""
    tower = TowerConfig(
        num_layers=layers,
        hidden_size=WIDTH,
        num_heads=16,
        ffn_size=FFN,
        norm="rms",
        affine_norm=True,
        positions="rope",
        activation="silu",
        gated=True,
    )
    return ModelConfig(towers={"main": tower}, vocab_size=vocabulary, max_positions=2048)


def fused(root: Path, **settings: Any) -> Run:
    """A fusion of the parents, without its certificate."""
    recipe = FusionRecipe(
        text=root / "text", image=root / "image", output=root / "child", **settings
    )

    def run() -> None:
        fusion = Fusion.plan(recipe)
        with fusion.writer() as writer:
            fusion.stream(writer)
            writer.finish(fusion.provenance())

    return run


def merged(root: Path) -> Run:
    """mergekit-yaml's linear merge of the same parents."""
    models = [
        {"model": str(root / f"hf_{name}"), "parameters": {"weight": 0.5}} for name in PARENTS
    ]
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    )
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, quiet=True)

    return lambda: run_merge(config, str(root / "merged"), options=options)


def copied(root: Path) -> Run:
    """`cp` of the bytes that the fusion wrote."""
    return lambda: subprocess.run(["cp", "-r", root / "child", root / "copy"], check=True)


def peak_memory(root: Path, settings: dict[str, Any]) -> float:
    """Anonymous memory of a fusion above that of its interpreter, in bytes."""
    context = multiprocessing.get_context("spawn")
    found: SimpleQueue[float] = context.SimpleQueue()
    process = context.Process(target=_watch, args=(root, settings, found))
    process.start()
    process.join()
    return found.get()


def _watch(root: Path, settings: dict[str, Any], found: "SimpleQueue[float]") -> None:
    run, pid, peak = fused(root, **settings), multiprocessing.current_process().pid, [0.0]
    assert pid is not None
    idle, done = anonymous_bytes(pid), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes(pid))
            time.sleep(PAUSE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    found.put(peak[0] - idle)


if __name__ == "__main__":
    run_command(main)
