"""The main job, end to end: two parents become one model that writes an illustrated page.

Run as `make quickstart`. Each stage is one or more documented commands, which serve a cluster as
well. A finished stage is skipped unless what it reads has changed; an unfinished one starts anew.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("examples/quickstart")
CONFIGS, DATA = HERE / "configs", HERE / "data"
OUT = Path("outputs/quickstart")
PAGE = OUT / "index.html"

PYTHON = [sys.executable]
ON_TWO_RANKS = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TRAIN = [*ON_TWO_RANKS, "-m", "megatron_jam.train"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands that write some folders."""

    name: str
    title: str
    commands: list[list[str]]
    """Run in order, or two at a time if `parallel`."""

    writes: list[Path]
    parallel: bool = False


def tool(name: str, *arguments: object) -> list[str]:
    """The command line of a tool of this project."""
    return [*PYTHON, f"tools/{name}.py", *map(str, arguments)]


TEXT_TOKENIZER, IMAGE_TOKENIZER = OUT / "text_tokenizer", OUT / "image_tokenizer"
SETS = OUT / "data"


def stages() -> list[Stage]:
    """The main job in order."""
    return [
        *tokenizers(),
        Stage(
            name="data",
            title="indexed sets of text, pairs and answers, trained and held out",
            commands=[command for end in ("", "_heldout") for command in prepare(end)],
            writes=[SETS],
            parallel=True,
        ),
        Stage(
            name="fresh",
            title="fresh weights of both parents",
            commands=[
                tool("init", CONFIGS / "tower.yaml", TEXT_TOKENIZER, OUT / "fresh" / name, seed)
                for name, seed in (("llm", "--seed=0"), ("image", "--seed=1"))
            ],
            writes=[OUT / "fresh"],
            parallel=True,
        ),
        training("llm", "parent: an LLM on text"),
        training("image", "parent: a text-to-image model on pairs"),
        Stage(
            name="fusion",
            title="JAM-Uniform, JAM-Width and JAM-Cross from the parents",
            commands=[tool("fuse", CONFIGS / f"{m}.yaml") for m in ("uniform", "width", "cross")],
            writes=[OUT / "fused"],
            parallel=True,
        ),
        training("alignment", "continued pretraining of JAM-Cross on text and pairs"),
        training("instruct", "instruction tuning on illustrated answers"),
        *results(),
    ]


def tokenizers() -> list[Stage]:
    """Pictures and text become ids of one vocabulary."""
    pairs, held_out = DATA / "pairs.tar", DATA / "pairs_heldout.tar"
    sizes = ["--vocab_size=4096", "--num_image_codes=512", "--num_sentinels=16"]
    texts = f"[{DATA / 'text.jsonl'},{DATA / 'interleaved.jsonl'},{pairs}]"
    options = [f"--validation={held_out}", "--steps=800"]
    return [
        Stage(
            name="image_tokenizer",
            title="image tokenizer: 64 codes a picture",
            commands=[tool("train_image_tokenizer", pairs, IMAGE_TOKENIZER, *options)],
            writes=[IMAGE_TOKENIZER],
        ),
        Stage(
            name="text_tokenizer",
            title="text tokenizer and joint vocabulary",
            commands=[tool("train_text_tokenizer", texts, TEXT_TOKENIZER, *sizes)],
            writes=[TEXT_TOKENIZER],
        ),
    ]


def prepare(end: str) -> list[list[str]]:
    """Commands that prepare the sets of trained ("") or of held-out concepts ("_heldout")."""
    pairs, both = DATA / f"pairs{end}.tar", [TEXT_TOKENIZER, IMAGE_TOKENIZER]
    questions, text = DATA / f"interleaved{end}.jsonl", DATA / f"text{end}.jsonl"
    return [
        tool(
            *("prepare_interleaved", questions, TEXT_TOKENIZER, SETS / f"answers{end}"),
            *(f"--pictures={pairs}", f"--image_tokenizer={IMAGE_TOKENIZER}"),
        ),
        tool("prepare_images", pairs, *both, SETS / f"pairs{end}"),
        tool("prepare_text", text, TEXT_TOKENIZER, SETS / f"text{end}"),
    ]


def results() -> list[Stage]:
    """What the models are worth, and what JAM-Cross writes."""
    models = ["llm/weights", "image/weights", "fused/uniform", "fused/width", "fused/cross"]
    folders = ",".join(str(OUT / name) for name in [*models, "alignment/weights"])
    names = ("text_heldout", "pairs", "pairs_heldout")
    sets = ",".join(f"{{name: {name}, path: {SETS / name}}}" for name in names)
    perplexity, questions = OUT / "perplexity.json", OUT / "questions.txt"
    evaluate = ["tools/evaluate.py", f"[{folders}]", f"[{sets}]"]
    evaluate += ["--context_length=88", f"--output={perplexity}"]
    weights, written = OUT / "instruct" / "weights", OUT / "generation"
    # Milder than the paper's for 7B towers: guidance 3.5 to 4, temperature 1.
    sampling = [f"--questions_file={questions}", "--sampling.guidance_scale=1.5"]
    sampling += ["--sampling.temperature=0.7", "--sampling.text_temperature=0.2"]
    return [
        Stage(
            name="perplexity",
            title="perplexities of parents, fusions and JAM-Cross",
            commands=[[*ON_TWO_RANKS, *evaluate]],
            writes=[perplexity],
        ),
        Stage(
            name="generation",
            title="illustrated answers for trained and held-out concepts",
            commands=[
                [*PYTHON, str(HERE / "questions.py"), str(DATA), str(questions)],
                tool("generate", weights, IMAGE_TOKENIZER, written, *sampling),
            ],
            writes=[written],
        ),
        Stage(
            name="page",
            title="the page",
            commands=[[*PYTHON, str(HERE / "page.py"), str(DATA), str(OUT)]],
            writes=[PAGE],
        ),
    ]


def training(name: str, title: str) -> Stage:
    """A phase of training on two ranks, as its configuration says."""
    return Stage(
        name=name,
        title=title,
        commands=[[*TRAIN, f"--config={CONFIGS / name}.yaml", f"--precision={precision()}"]],
        writes=[OUT / name],
    )


def precision() -> str:
    """bf16 where the CPU has instructions for it, which makes a step about a third shorter."""
    cpu = Path("/proc/cpuinfo")
    has_bf16 = cpu.is_file() and "avx512_bf16" in cpu.read_text()
    return "bf16" if has_bf16 else "fp32"


def main() -> int:
    """Run what is not done yet; the exit status of the first command that fails."""
    os.chdir(ROOT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Two ranks on the CPU, whatever GPUs there are; name GPUs to use at least two of them.
    environment.setdefault("CUDA_VISIBLE_DEVICES", "")
    begun, todo = time.monotonic(), stages()
    fingerprint = ""
    for number, stage in enumerate(todo, 1):
        fingerprint = read_by(stage, fingerprint)
        mark = OUT / ".done" / stage.name
        heading = f"[{number}/{len(todo)}] {stage.title}"
        if mark.is_file() and mark.read_text() == fingerprint and all_exist(stage.writes):
            print(f"{heading}: done before", flush=True)
            continue
        print(f"\n{heading}", flush=True)
        mark.unlink(missing_ok=True)
        for path in stage.writes:
            remove(path)
        start = time.monotonic()
        status = run_stage(stage, environment)
        if status:
            print(f"{heading}: failed with exit status {status}", file=sys.stderr)
            return status
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint)
        print(f"{heading}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nFinished in {(time.monotonic() - begun) / 60:.1f} minutes. Open {PAGE.resolve()}")
    return 0


def run_stage(stage: Stage, environment: dict[str, str]) -> int:
    """Run a stage's commands; 0, or the exit status of one that failed."""

    def run(command: list[str]) -> int:
        shown = ["python" if word == sys.executable else word for word in command]
        print("  $ " + shlex.join(shown), flush=True)
        return subprocess.run(command, env=environment, check=False).returncode

    if stage.parallel:
        with ThreadPoolExecutor(2) as pool:
            return max(pool.map(run, stage.commands), key=abs)
    for command in stage.commands:
        if status := run(command):
            return status
    return 0


def read_by(stage: Stage, before: str) -> str:
    """Fingerprint of what a stage depends on: its commands, their small input files, the stages
    before it."""
    digest = hashlib.sha256(before.encode())
    for command in stage.commands:
        for word in command[1:]:
            digest.update(word.encode() + b"\0")
            for path in map(Path, re.split(r"[=,\[\]]", word)):
                if path.is_file() and HERE in path.parents:
                    digest.update(path.read_bytes())
    return digest.hexdigest()


def all_exist(paths: list[Path]) -> bool:
    """Whether all of a stage's results are there."""
    return all(path.exists() for path in paths)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; run it again to begin with the stage that was under way")
