"""The commands as a user runs them: what they make, and the one line that a mistake ends in."""

import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import write_set
from megatron_jam.models.parameters import num_parameters, parameter_table
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.stop import EXIT_REQUEUE
from megatron_jam.weights.folder import VOCABULARY, WeightsFolder
from megatron_jam.weights.initial import initial_tensor
from megatron_jam.weights.reference import reference_logits
from tests.helpers.commands import environment, fails, module, tool
from tests.helpers.pico import pico_config, pico_folder, pico_tokenizer, pico_vocabulary

TRAIN = "megatron_jam.train"
OTHER = JointVocabulary.build(text_size=300, num_image_codes=15, num_sentinels=5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, three_heads/, and the prepared sets `set` and `other` (of another vocabulary)."""
    root = tmp_path_factory.mktemp("cli")
    small = {"num_layers": 1, "hidden_size": 24}
    pico_folder(root / "model", pico_config("tower", num_heads=4, **small), dtype=torch.float32)
    three = pico_config("tower", num_heads=3, ffn_size=96, **small)
    pico_folder(root / "three_heads", three, dtype=torch.float32)
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(4, 300, size=9), 2) for _ in range(5)]
    for name, vocabulary in (("set", pico_vocabulary()), ("other", OTHER)):
        write_set(
            root / name,
            documents,
            vocabulary=vocabulary,
            tokenizer_sha256=pico_tokenizer().sha256,
            kind="text",
        )
    return root


def settings(home: Path, **changes: Any) -> dict[str, Any]:
    """A short run that would succeed."""
    values: dict[str, Any] = {
        "weights": str(home / "model"),
        "output": "run",
        "data": {"sets": [{"name": "a", "path": str(home / "set")}]},
        "steps": 1,
        "context_length": 8,
        "global_batch_size": 2,
    }
    return {**values, **changes}


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return path.name


def test_init_draws_a_model(home: Path, tmp_path: Path) -> None:
    tower = {"num_layers": 1, "hidden_size": 16, "num_heads": 2}
    config = write(tmp_path / "model.yaml", {"towers": {"main": tower}, "max_positions": 8})
    done = tool("init", config, str(home / "model"), "fresh", "--seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = WeightsFolder(tmp_path / "fresh")
    assert folder.config.vocab_size == pico_vocabulary().size
    assert folder.provenance["seed"] == 5
    for entry in parameter_table(folder.config):
        due = initial_tensor(entry, folder.config, seed=5)
        assert torch.equal(folder.read(entry.name), due), entry.name


def test_init_takes_text_ids_from_the_vocabulary(home: Path, tmp_path: Path) -> None:
    tower = {"num_layers": 1, "hidden_size": 16, "num_heads": 2}
    pair = {"towers": {"image": tower, "text": tower}, "max_positions": 8, "head": "wide"}
    config = write(tmp_path / "model.yaml", pair)
    done = tool("init", config, str(home / "model"), "fresh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert WeightsFolder(tmp_path / "fresh").config.text_ids == [0, 300]
    config = write(tmp_path / "model.yaml", {**pair, "text_ids": [4, 7]})
    done = tool("init", config, str(home / "model"), "other", cwd=tmp_path)
    fails(done, r"text_ids \[4, 7\] are not the \[0, 300\] of .*; leave them out")
    described = json.loads((tmp_path / "fresh/config.json").read_text())
    (tmp_path / "fresh/config.json").write_text(json.dumps({**described, "text_ids": [4, 7]}))
    with pytest.raises(UsageError, match="take both from the same model"):
        WeightsFolder(tmp_path / "fresh")


def test_init_does_not_replace_what_it_reads(home: Path, tmp_path: Path) -> None:
    weights = pico_folder(tmp_path / "w", pico_config("tower", num_layers=1), dtype=torch.float32)
    before = (weights / "provenance.json").read_bytes()
    config = write(tmp_path / "tower.yaml", {})
    done = tool("init", config, "w", "w", cwd=tmp_path)
    fails(done, "output w would replace w, which is read: name another folder")
    assert (weights / "provenance.json").read_bytes() == before


def test_init_without_its_file(home: Path, tmp_path: Path) -> None:
    done = tool("init", "nowhere.yaml", str(home / "model"), "fresh", cwd=tmp_path)
    fails(done, "no such file or folder: nowhere.yaml")
    assert list(tmp_path.iterdir()) == []


def test_fuse_refuses_unlike_parents(home: Path, tmp_path: Path) -> None:
    recipe = {"method": "width", "text": str(home / "model"), "image": str(home / "three_heads")}
    name = write(tmp_path / "recipe.yaml", {**recipe, "output": "child"})
    before = sorted(tmp_path.iterdir())
    fails(tool("fuse", name, cwd=tmp_path), r"differ in num_heads \(4, 3\).*take method cross")
    assert sorted(tmp_path.iterdir()) == before


def test_fuse_plans_makes_and_measures(home: Path, tmp_path: Path) -> None:
    tower = pico_config("tower", num_heads=4, num_layers=1, hidden_size=24)
    pico_folder(tmp_path / "image", tower, dtype=torch.float32, seed=1)
    recipe = {"method": "cross", "text": str(home / "model"), "image": "image", "output": "child"}
    name = write(tmp_path / "recipe.yaml", recipe)
    before = sorted(tmp_path.iterdir())
    planned = tool("fuse", name, "--plan", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert sorted(tmp_path.iterdir()) == before
    lines = planned.stdout.splitlines()
    assert "text ids 296: the LLM's rows 296" in planned.stderr + planned.stdout
    assert lines[-1].split("\t") == ["321", "<sentinel:3>", "image", "321", "321"]

    fails(tool("fuse", name, "--sets", "[{name: a, path: nowhere}]", cwd=tmp_path), ".*nowhere.*")
    assert sorted(tmp_path.iterdir()) == before

    pictures = pico_vocabulary().image
    write_set(
        tmp_path / "pictures",
        [np.array([*range(pictures.start + n, pictures.stop), 2]) for n in range(3)],
        vocabulary=pico_vocabulary(),
        tokenizer_sha256=pico_tokenizer().sha256,
        image_tokenizer_sha256="of codes",
        kind="pairs",
    )
    paths = {"a": home / "set", "b": home / "other", "c": "pictures"}
    sets = json.dumps([{"name": key, "path": str(path)} for key, path in paths.items()])
    done = tool("fuse", name, "--sets", sets, "--context_length", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    child = WeightsFolder(tmp_path / "child")
    certificate = child.provenance["certificate"]
    assert certificate["largest_error_in_ulp"] == 0
    assert 0 < certificate["models_and_reference"] < 1e-5
    (rows,) = [json.loads((tmp_path / "child" / "retention.json").read_text())]
    assert [(row["set"], row["model"]) for row in rows] == [
        (name, model) for name in ("a", "b", "c") for model in ("LLM", "image model", "child")
    ]
    # Set b is of another vocabulary; set a has no pictures, and set c no text.
    assert all(row["text"] is None and row["image"] is None for row in rows[3:6])
    assert len({row["image"] for row in rows[6:]}) == 3
    assert all(row["image"] > 1 and row["text"] is None for row in rows[6:])
    assert len({row["text"] for row in rows[:3]}) == 3
    assert all(row["text"] > 1 and row["image"] is None for row in rows[:3])


def test_evaluate_writes_perplexities(home: Path, tmp_path: Path) -> None:
    sets = json.dumps([{"name": "a", "path": str(home / "set")}])
    done = tool(
        "evaluate",
        *(json.dumps([str(home / "model")]), sets),
        *("--context_length", "12", "--output", "result/perplexity.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "result/perplexity.json").read_text())
    assert (result["weights"], result["set"]) == (str(home / "model"), "a")
    folder = WeightsFolder(home / "model")
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(4, 300, size=9), 2) for _ in range(5)]
    stream = torch.from_numpy(np.concatenate(documents))
    nats = []
    for start, end in pairwise([0, 9, 19, 29, 39, 49]):  # each document's last token
        block = stream[start : end + 1]
        logits = reference_logits(folder.config, folder.read, block[None, :-1])[0]
        nats.append(F.cross_entropy(logits, block[1:], reduction="sum").item())
    due = math.exp(sum(nats) / 49)
    assert result["perplexity"]["all"] == pytest.approx(due, rel=1e-4)
    assert set(result["perplexity"]) == {"all", "text", "special"}


def test_evaluate_refuses_a_vocabulary_that_is_not_the_weights(home: Path, tmp_path: Path) -> None:
    tower = pico_config("tower", num_heads=4, num_layers=1, hidden_size=24)
    model = pico_folder(tmp_path / "mixed", tower, dtype=torch.float32)
    JointVocabulary.build(text_size=300, num_image_codes=99, num_sentinels=5).save(
        model / VOCABULARY
    )
    sets = json.dumps([{"name": "a", "path": str(home / "set")}])
    arguments = (json.dumps(["mixed"]), sets, "--context_length", "8", "--output", "result.json")
    done = tool("evaluate", *arguments, cwd=tmp_path)
    fails(done, "mixed: vocabulary.json has 406 ids, but config.json says vocab_size 322; take .*")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-4}, "'learning_rate' is not accepted"),
        ({"weights": "nowhere"}, "nowhere is not a weights folder"),
        (
            {"parallel": {"tensor": 2}},
            "parallel.tensor 2 x parallel.pipeline 1 does not divide the 1 ranks; start a"
            " multiple of 2 ranks",
        ),
        ({"context_length": 65}, "context_length 65 is longer than the model's max_positions 64"),
        ({"parallel": {"sequence": True}}, "parallel.sequence needs parallel.tensor of at least 2"),
        ({"freeze": ["text"]}, "but the model has one tower alone"),
    ],
    ids=["unknown key", "missing weights", "ranks", "length", "sequence", "freeze"],
)
def test_train_refuses(changes: dict[str, Any], message: str, home: Path, tmp_path: Path) -> None:
    name = write(tmp_path / "run.yaml", settings(home, **changes))
    fails(module(TRAIN, "--config", name, cwd=tmp_path), message)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_run_does_not_replace_what_it_began_from(home: Path, tmp_path: Path) -> None:
    config = pico_config("tower", num_layers=1)
    kept = pico_folder(tmp_path / "run" / "weights", config, dtype=torch.float32)
    before = (kept / "provenance.json").read_bytes()
    name = write(tmp_path / "run.yaml", settings(home, weights="run/weights"))
    done = module(TRAIN, "--config", name, cwd=tmp_path)
    fails(done, "output run/weights would replace run/weights, which is read: name another folder")
    assert (kept / "provenance.json").read_bytes() == before


def test_train_says_what_it_computes_with(home: Path, tmp_path: Path) -> None:
    name = write(tmp_path / "run.yaml", settings(home))
    done = module(TRAIN, "--config", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count = num_parameters(WeightsFolder(home / "model").config)
    start = re.escape(f"{count:,} parameters | 1 ranks: TP 1 x PP 1 x DP 1 | cpu")
    assert re.search(start, done.stderr)
    assert "memory planned: " in done.stderr
    parts = json.loads((tmp_path / "run/environment.json").read_text())["parts"]
    assert len(parts) == 4
    for part in parts:
        assert part["uses"] in done.stderr


def test_train_refuses_data_of_another_vocabulary(home: Path, tmp_path: Path) -> None:
    data = {"sets": [{"name": "a", "path": str(home / "other")}]}
    name = write(tmp_path / "run.yaml", settings(home, data=data))
    message = "other was prepared with another vocabulary .*: prepare it again"
    fails(module(TRAIN, "--config", name, cwd=tmp_path), message)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_train_that_is_asked_to_stop_has_a_status_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    stop = tmp_path / "run/stop"
    stop.parent.mkdir()
    stop.touch()
    name = write(tmp_path / "run.yaml", settings(home))
    done = module(TRAIN, "--config", name, cwd=tmp_path)
    assert done.returncode == EXIT_REQUEUE == 75
    assert (tmp_path / "run/requeue").read_text() == "stopped at step 0 by run/stop\n"
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert told == "no failure: asked to stop by run/stop; the next start goes on"


def test_train_refuses_tensor_parallelism_that_cuts_heads(home: Path, tmp_path: Path) -> None:
    """On two real ranks; the line comes once, and ends the report that torchrun adds."""
    changes = {"weights": str(home / "three_heads"), "parallel": {"tensor": 2}}
    name = write(tmp_path / "run.yaml", settings(home, **changes))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *launch, "-m", TRAIN, "--config", name],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert told == [
        "error: parallel.tensor 2 does not divide num_heads 3 of tower main; choose a divisor of it"
    ]
    *_, last, border = done.stderr.rstrip().splitlines()
    assert last == f"  traceback : {told[0]}"
    assert set(border) == {"="}
    assert "megatron_jam" not in "".join(re.findall(r'File "[^"]*"', done.stderr))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
