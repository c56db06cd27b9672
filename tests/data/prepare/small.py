"""A small world to prepare: a tokenizer, files of every kind, runs in processes of their own."""

import gzip
import io
import json
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from megatron_jam.data.prepare import readers, writing
from megatron_jam.data.prepare.held_out import HeldOut
from megatron_jam.data.prepare.pairs import PairJob
from megatron_jam.data.prepare.pictures import EncodingConfig, ImageEncoding
from megatron_jam.data.prepare.running import Run
from megatron_jam.data.prepare.text import TextJob
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer

WORDS = ["a", "the", "cat", "\N{LEMON}", "sits", "</s>", "<break>", "<sentinel:0>"]
NUM_CODES = 32


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 30 words, most of them unlike the others."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


def text_tools() -> dict[str, object]:
    """A byte-level tokenizer without merges, and its vocabulary."""
    tokenizer = TextTokenizer.train(["a cat"], 262)
    vocabulary = JointVocabulary.build(
        text_size=tokenizer.vocab_size, num_image_codes=NUM_CODES, num_sentinels=8
    )
    return {"tokenizer": tokenizer, "vocabulary": vocabulary}


def image_folder(path: Path) -> Path:
    """An image tokenizer of 16 codes a picture of 16 x 16 pixels."""
    config = VqConfig(image_size=16, channels=(8,), num_blocks=1, num_codes=NUM_CODES)
    VqTokenizer(config).save(path)
    return path


def encoding(path: Path | str, **settings: object) -> ImageEncoding:
    """The image tokenizer at `path`, or codes made by something of this name."""
    vocabulary = text_tools()["vocabulary"]
    return ImageEncoding.of(str(path), vocabulary, EncodingConfig(**settings), lambda: "cpu")


def png(seed: int, size: tuple[int, int] = (20, 12)) -> bytes:
    """A picture of noise."""
    rng = np.random.default_rng(seed)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A .tar, compressed as its name says."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return write_bytes(path, stream.getvalue())


def write_bytes(path: Path, data: bytes) -> Path:
    """A file, compressed as its name says."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        third = len(data) // 3  # two frames, as pzstd and appended files have
        data = b"".join(
            pyarrow.compress(part, codec="zstd", asbytes=True)
            for part in (data[:third], data[third:])
        )
    path.write_bytes(data)
    return path


def write_texts(path: Path, values: list[str]) -> Path:
    """Texts with a source each, in a file of the kind that its name says."""
    rows = [{"text": text, "source": f"book {i}"} for i, text in enumerate(values)]
    kind = next(each for each in path.suffixes if each not in (".gz", ".zst"))
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    if kind == ".tar":
        files = {}
        for i, row in enumerate(rows):
            files |= {f"{i}.text": row["text"].encode(), f"{i}.json": json.dumps(row).encode()}
        return write_tar(path, files)
    if kind == ".jsonl":
        data = "".join(f"{json.dumps(row)}\n" for row in rows)
    else:
        comma = "," if kind == ".csv" else "\t"
        data = "".join(f"{row['text']}{comma}{row['source']}\n" for row in rows)
        data = f"text{comma}source\n{data}"
    return write_bytes(path, data.encode())


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    found = sorted(each for each in folder.rglob("*") if each.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def prepare_texts(run: Run, held_out: HeldOut, chunk_bytes: int, commit_seconds: float) -> None:
    """What a process of its own does; its chunks are small, so that it has many."""
    readers.CHUNK_BYTES = chunk_bytes
    writing.COMMIT_SECONDS = commit_seconds
    run.prepare(TextJob(**text_tools(), held_out=held_out))


def prepare_pairs(run: Run, folder: Path, batch_size: int, commit_seconds: float) -> None:
    """The same for pairs."""
    writing.COMMIT_SECONDS = commit_seconds
    run.prepare(PairJob(**text_tools(), images=encoding(folder, batch_size=batch_size)))


def start(function: object, *arguments: object) -> object:
    """Begin `function` in a process of its own: a fork, which has everything imported."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process
