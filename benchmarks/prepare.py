"""tools/prepare_text.py over tools/preprocess_data.py of a checkout of Megatron-LM: whole commands.

Both get the same .jsonl, the same tokenizer.json (Hugging Face's tokenizers, on one thread in each
process) and as many worker processes, and write the same .bin; ours writes checksums, hashes and
the side table besides. The checkout must be of the release of the installed megatron-core.
"""

import json as json_
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt

from benchmarks.timing import seconds, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import read_info
from megatron_jam.tokenizers.text import TOKENIZER_FILE, TextTokenizer
from megatron_jam.tokenizers.vocabulary import VOCABULARY_FILE, JointVocabulary

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "examples" / "quickstart" / "data" / "text.jsonl"


def main(
    megatron_lm: Path,
    *,
    megabytes: PositiveInt = 20,
    pairs: PositiveInt = 3,
    workers: PositiveInt = 2,
    json: bool = False,
) -> None:
    """Print the ratio of tokens a second, and ours by itself.

    Args:
        megatron_lm: folder of the checkout.
        megabytes: of text.
        pairs: how often each is run.
        workers: processes of each.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    tool = megatron_lm.resolve() / "tools" / "preprocess_data.py"
    if not tool.is_file():
        raise UsageError(f"{tool} is missing: name a checkout of Megatron-LM")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_tokenizer(folder / "tokenizer")
        _write_texts(folder / "text.jsonl", megabytes * 1_000_000)
        ours = _command(
            *(ROOT / "tools" / "prepare_text.py", folder / "text.jsonl", folder / "tokenizer"),
            *(folder / "ours", "--workers", workers),
        )
        theirs = _command(
            *(tool, "--input", folder / "text.jsonl", "--output-prefix", folder / "theirs"),
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", folder / "tokenizer"),
            *("--append-eod", "--workers", workers, "--log-interval", 10**9),
        )
        row = speed_over("prepare_text over preprocess_data", ours, theirs, pairs=pairs, warm=1)
        row.print(as_json=json)
        same = (folder / "ours.bin").read_bytes() == (
            folder / "theirs_text_document.bin"
        ).read_bytes()
        assert same, "the two programs wrote different tokens"
        rate = read_info(folder / "ours").num_tokens / seconds(ours)
        print(f'{{"name": "tokens a second", "value": {rate:.0f}}}' if json else f"{rate:.0f} a s")


def _write_tokenizer(folder: Path) -> None:
    texts = [json_.loads(line)["text"] for line in TEXTS.open(encoding="utf-8")]
    tokenizer = TextTokenizer.train(texts, vocab_size=4_096)
    folder.mkdir()
    tokenizer.save(folder / TOKENIZER_FILE)
    vocabulary = JointVocabulary.build(text_size=4_096, num_image_codes=8_192, num_sentinels=512)
    vocabulary.save(folder / VOCABULARY_FILE)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json_.dumps(settings))


def _write_texts(path: Path, num_bytes: int) -> None:
    """Documents of ten of the quickstart's texts each, in random order."""
    texts = [json_.loads(line)["text"].strip() for line in TEXTS.open(encoding="utf-8")]
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < num_bytes:
            chosen = "\n".join(texts[i] for i in rng.integers(0, len(texts), 10))
            stream.write(json_.dumps({"text": chosen}) + "\n")


def _command(*arguments: object) -> Callable[[], None]:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

    def run() -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"{command[1]} failed: {done.stderr.strip().splitlines()[-1]}")

    return run


if __name__ == "__main__":
    run_command(main)
