"""Memory of tools/convert_metaseq.py on a checkpoint that is made on the spot.

Peak anonymous memory above that of the imported interpreter, over what is allowed: three times the
largest tensor and 100 MB, whatever the checkpoint's size.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

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
    *, gigabytes: float = 4.0, pairs: int = 1, folder: Path | None = None, json: bool = False
) -> None:
    """Convert a CM3leon-style checkpoint in fp16 and report what it took.

    Args:
        gigabytes: size of the checkpoint, in 1e9 bytes.
        pairs: how often it is converted.
        folder: where it is made and removed again; else the system's temporary folder.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    memory = []
    with tempfile.TemporaryDirectory(dir=folder) as root:
        allowed = 3 * make(Path(root), gigabytes * 1e9) + ALLOWED
        arguments = ("--input", f"{root}/in", "--tokenizer", f"{root}/tokenizer")
        idle = watch("--help")
        for _ in range(pairs):
            memory.append((watch(*arguments, "--output", f"{root}/out") - idle) / allowed)
    row(f"peak memory over the allowed ({gigabytes:g} GB)", memory).print(as_json=json)


def make(root: Path, num_bytes: float) -> int:
    """Write a checkpoint of about `num_bytes` and its tokenizer; return its largest tensor's."""
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    TextTokenizer.train(["a b c"], vocab_size=300).save(tokenizer / TOKENIZER_FILE)
    vocabulary = JointVocabulary.build(text_size=TEXT_IDS, num_image_codes=16, num_sentinels=14)
    vocabulary.save(tokenizer / VOCABULARY_FILE)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).half()

    d = WIDTH
    layer = {
        "self_attn.qkv_proj.weight": draw(3 * d, d),
        "self_attn.out_proj.weight": draw(d, d),
        "fc1.weight": draw(4 * d, d),
        "fc2.weight": draw(d, 4 * d),
    }
    tensors = {
        "decoder.embed_tokens.weight": draw(vocabulary.size, d),
        "decoder.embed_positions.weight": draw(POSITIONS + 2, d),
    }
    outside = sum(t.nbytes for t in tensors.values())
    count = max(1, round((num_bytes - outside) / sum(t.nbytes for t in layer.values())))
    for number in range(count):
        for name, tensor in layer.items():
            tensors[f"decoder.layers.{number}.{name}"] = tensor.clone()  # each lies apart on disk
    settings = {"decoder_attention_heads": HEADS, "activation_fn": "relu"}
    (root / "in").mkdir()
    torch.save({"cfg": {"model": settings}, "model": tensors}, root / "in" / "reshard.pt")
    return max(tensor.nbytes for tensor in tensors.values())


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
