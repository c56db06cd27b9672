"""Memory of tools/convert_metaseq.py on a checkpoint that is made on the spot.

Peak anonymous memory above that of the imported interpreter, over what is allowed: three times the
largest tensor and 100 MB, whatever the checkpoint's size.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.timing import row
from megatron_jam.config.cli import run_command
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "convert_metaseq.py"
WIDTH, HEADS, TEXT_IDS, POSITIONS = 2048, 16, 50_000, 2048
ALLOWED = 100e6
PAUSE_SECONDS = 0.01


def main(
    *,
    gigabytes: float = 1.5,
    parts: int = 8,
    shards: int = 4,
    pairs: int = 1,
    folder: Path | None = None,
    json: bool = False,
) -> None:
    """Convert a CM3leon-style checkpoint in fp16, one file and then many, and report what it took.

    Args:
        gigabytes: size of the checkpoint, in 1e9 bytes.
        parts: tensor-parallel parts of the second one.
        shards: FSDP shards of each of its parts.
        pairs: how often each is converted.
        folder: where they are made and removed again; else the system's temporary folder.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    idle = watch("--help")
    for number, each, form in ((1, 0, "one file"), (parts, shards, f"{parts} x {shards} files")):
        memory = []
        with tempfile.TemporaryDirectory(dir=folder) as root:
            largest = make(Path(root), gigabytes * 1e9, parts=number, shards=each)
            arguments = ("--input", f"{root}/in", "--tokenizer", f"{root}/tokenizer")
            for _ in range(pairs):
                peak = watch(*arguments, "--output", f"{root}/out") - idle
                memory.append(peak / (3 * largest + ALLOWED))
        row(f"peak memory over the allowed ({gigabytes:g} GB, {form})", memory).print(as_json=json)


def make(root: Path, num_bytes: float, *, parts: int, shards: int) -> int:
    """Write a checkpoint of about `num_bytes` and its tokenizer; return its largest tensor's."""
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    TextTokenizer.train(["a b c"], vocab_size=300).save(tokenizer / TOKENIZER_FILE)
    vocabulary = JointVocabulary.build(text_size=TEXT_IDS, num_image_codes=16, num_sentinels=14)
    vocabulary.save(tokenizer / VOCABULARY_FILE)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).half()

    d, rows = WIDTH, -(-vocabulary.size // parts)
    positions = draw(POSITIONS + 2, d)  # the one table that all parts share
    count = round((num_bytes - (rows * parts * d + positions.numel()) * 2) / (12 * d * d * 2))
    settings = {"decoder_attention_heads": HEADS, "activation_fn": "relu"}
    (root / "in").mkdir()
    for part in range(parts):
        layer = {
            "self_attn.qkv_proj.weight": draw(3 * d // parts, d),
            "self_attn.out_proj.weight": draw(d, d // parts),
            "fc1.weight": draw(4 * d // parts, d),
            "fc2.weight": draw(d, 4 * d // parts),
        }
        rooms = {"decoder": {"embed_tokens.weight": draw(rows, d)}}
        rooms["decoder"]["embed_positions.weight"] = positions
        for number in range(max(1, count)):
            # Each lies apart on disk.
            rooms[f"decoder.layers.{number}"] = {k: v.clone() for k, v in layer.items()}
        mark = f"-model_part-{part}" if parts > 1 else ""
        for rank, values in enumerate(files(rooms, shards)):
            name = f"reshard{mark}" + (f"-shard{rank}" if shards else "") + ".pt"
            torch.save({"cfg": {"model": settings}, **values}, root / "in" / name)
    return max(vocabulary.size, 4 * d) * d * 2


def files(rooms: Mapping[str, Mapping[str, torch.Tensor]], shards: int) -> list[dict[str, Any]]:
    """What the files of a part hold: one with every tensor, or FSDP shards of a flat vector a
    room."""
    if not shards:
        return [{"model": {f"{r}.{k}": v for r, held in rooms.items() for k, v in held.items()}}]
    found: list[dict[str, Any]] = [{"model": {}} for _ in range(shards)]
    for values in found:
        values["shard_metadata"] = {"param_metadata": [], "buffer_names": []}
    for room, held in rooms.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in held.values()])
        size = -(-len(flat) // shards)
        for rank, values in enumerate(found):
            chunk = flat[rank * size : (rank + 1) * size]
            padding = size - len(chunk)
            values["model"][f"{room}.flat_param_0"] = F.pad(chunk, (0, padding)).clone()
            names = {"names": list(held), "shapes": [tensor.shape for tensor in held.values()]}
            numels = [tensor.numel() for tensor in held.values()]
            entry = {"flat_param_0": {**names, "numels": numels, "padding": padding}}
            metadata = values["shard_metadata"]["param_metadata"]
            metadata.append({"fsdp_path": room, "params": entry, "shared_param_info": []})
    return found


def watch(*arguments: str) -> float:
    """Run the tool; its peak anonymous memory in bytes."""
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(PAUSE_SECONDS)
    if process.returncode != 0:
        assert process.stderr is not None
        raise RuntimeError(process.stderr.read())
    return peak


def anonymous_bytes(pid: int) -> float:
    """RssAnon of a process (proc(5)); 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(float(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    run_command(main)
