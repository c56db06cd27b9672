"""Runs over texts: the same bytes however they went, and everything bad is said."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.data.indexed import open_set, read_info
from megatron_jam.data.prepare import running, writing
from megatron_jam.data.prepare.held_out import HeldOut, HeldOutConfig, piece_hash, pieces
from megatron_jam.data.prepare.running import Run, Shard
from megatron_jam.data.prepare.text import TextJob
from tests.data.prepare.small import (
    content_of,
    prepare_texts,
    start,
    text_tools,
    texts,
    write_bytes,
    write_texts,
)

HELD_OUT = HeldOut(shares={"valid": 0.1, "test": 0.05})


def documents(prefix):
    opened = open_set(prefix, text_tools()["vocabulary"])
    return [opened.document(i).astype(np.int64) for i in range(opened.num_documents)]


def laid_out(values):
    tools = text_tools()
    return [[*tools["tokenizer"].encode(text), tools["vocabulary"].eos] for text in values]


@pytest.fixture
def inputs(tmp_path):
    """Five files of 80 texts, the last of which cannot be read to its end; two bad lines."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    kinds = ["jsonl", "jsonl.gz", "parquet", "csv", "jsonl.zst"]
    paths = [write_texts(folder / f"{i}.{k}", texts(80, i)) for i, k in enumerate(kinds)]
    lines = paths[0].read_bytes().splitlines(keepends=True)
    lines[7:8] = [b'{"text": \n', b'{"text": ""}\n', lines[7]]
    paths[0].write_bytes(b"".join(lines))
    paths[-1].write_bytes(paths[-1].read_bytes()[:-20])
    return [str(path) for path in paths]


def prepare(inputs, prefix, held_out=HELD_OUT, **settings):
    run = Run(inputs=inputs, prefix=str(prefix), **{"bad": "skip", "workers": 1} | settings)
    run.prepare(TextJob(**text_tools(), held_out=held_out))


def test_documents_and_where_they_are_from(tmp_path):
    values = texts(40)
    path = write_texts(tmp_path / "x.jsonl", values)
    prepare(str(path), tmp_path / "sets/x", HeldOut())
    assert [each.tolist() for each in documents(tmp_path / "sets/x")] == laid_out(values)
    rows = pyarrow.parquet.read_table(tmp_path / "sets/x.parquet").to_pylist()
    assert [row["where"] for row in rows] == [f"{path}:{i + 1}" for i in range(40)]
    assert [row["source"] for row in rows] == [f"book {i}" for i in range(40)]
    assert [row["pieces"] for row in rows] == [
        [piece_hash(np.array(each[:-1]))] for each in laid_out(values)
    ]
    assert sorted(os.listdir(tmp_path / "sets")) == ["x.bin", "x.idx", "x.json", "x.parquet"]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, inputs, workers, monkeypatch):
    prepare(inputs, tmp_path / "one/x")
    monkeypatch.setattr("megatron_jam.data.prepare.readers.CHUNK_BYTES", 3000)
    prepare(inputs, tmp_path / "many/x", workers=workers)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "many")


def prepare_until(place, counted, run):
    """Prepare, and be killed with SIGKILL before operation `place` on the disk, from 0; `counted`
    has how many there were."""

    def counting(function):
        def operation(*arguments, **settings):
            if counted.value == place:
                os.kill(os.getpid(), signal.SIGKILL)
            counted.value += 1
            return function(*arguments, **settings)

        return operation

    for name in ("fsync", "replace", "unlink", "rmdir"):
        setattr(os, name, counting(getattr(os, name)))
    prepare_texts(run, HELD_OUT, 2000, 0.0)


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path, inputs, times):
    """At places that are drawn, not at times, which on a busy machine are all at the beginning."""
    prepare(inputs, tmp_path / "whole/x")
    run = Run(inputs=inputs, prefix=str(tmp_path / "killed/x"), bad="skip", workers=2)

    def runs_until(place):
        """Whether the run came to its end, and how many operations there were before."""
        counted = multiprocessing.Value("q", 0)
        process = start(prepare_until, place, counted, run)
        process.join()
        if process.exitcode == 0:
            assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")
            return True, counted.value
        assert process.exitcode == -signal.SIGKILL
        return False, counted.value

    _, total = runs_until(-1)
    rng, kills, states = random.Random(0), 0, set()
    state = tmp_path / "killed/.x.writing/state.json"
    while kills < times:
        ended, _ = runs_until(rng.randrange(total))
        if not ended:
            kills += 1
            states.add(state.read_text() if state.exists() else "")
    assert runs_until(-1)[0]
    assert len(states) > times // 2  # the kills hit different places


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_moment(tmp_path, inputs):
    prepare(inputs, tmp_path / "whole/x")
    run = Run(inputs=inputs, prefix=str(tmp_path / "killed/x"), bad="skip", workers=2)

    def runs_for(seconds):
        begun = time.monotonic()
        process = start(prepare_texts, run, HELD_OUT, 2000, 0.0)
        process.join(seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        else:
            assert process.exitcode == 0
            assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")
        return time.monotonic() - begun

    seconds, rng = runs_for(None), random.Random(0)
    for _ in range(20):
        runs_for(rng.uniform(0, seconds))
    runs_for(None)


def test_work_of_other_settings_is_not_gone_on_with(tmp_path, inputs):
    prepare(inputs[:2], tmp_path / "whole/x", HeldOut())
    run = Run(inputs=inputs[:2], prefix=str(tmp_path / "sets/x"), bad="skip", workers=1)
    process = start(prepare_texts, run, HELD_OUT, 500, 0.0)
    while not (tmp_path / "sets/.x.writing/state.json").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    prepare(inputs[:2], tmp_path / "sets/x", HeldOut())
    assert content_of(tmp_path / "sets") == content_of(tmp_path / "whole")


def test_workers_end_with_a_killed_run(tmp_path, inputs):
    run = Run(inputs=inputs * 20, prefix=str(tmp_path / "sets/x"), bad="skip", workers=2)
    process = start(prepare_texts, run, HELD_OUT, 300, 5.0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(found := children.read_text().split()) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{each}") for each in found):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_runs_do_not_write_one_set(tmp_path, inputs):
    run = Run(inputs=inputs * 50, prefix=str(tmp_path / "sets/x"), bad="skip", workers=1)
    process = start(prepare_texts, run, HELD_OUT, 1000, 0.0)
    while not (tmp_path / "sets/.x.writing/state.json").exists():
        time.sleep(0.01)
    with pytest.raises(UsageError, match="another process is preparing"):
        prepare(inputs, tmp_path / "sets/x")
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def prepare_and_measure(peak, run):
    """`peak` becomes the growth of the largest resident set, in bytes."""

    def resident(name):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024

    writing.ROWS_AT_ONCE, writing.BYTES_AT_ONCE = 1 << 10, 1 << 16
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is the present one
    before = resident("VmRSS")
    prepare_texts(run, HeldOut(), 1 << 16, 5.0)
    peak.value = resident("VmHWM") - before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    grown = []
    for name, count in (("few", 5_000), ("many", 80_000)):
        path = write_texts(tmp_path / f"{name}.jsonl", texts(100) * (count // 100))
        run = Run(inputs=str(path), prefix=str(tmp_path / name), workers=1)
        peak = multiprocessing.Value("q", 0)
        process = start(prepare_and_measure, peak, run)
        process.join()
        assert process.exitcode == 0
        assert read_info(tmp_path / name).num_documents == count
        grown.append(peak.value)
    size = (tmp_path / "many.jsonl").stat().st_size
    assert size > 8e6
    assert grown[1] - grown[0] < size / 4


def test_slices_are_kept_out_of_training(tmp_path, inputs):
    again = write_texts(tmp_path / "again.jsonl", texts(80, 1) + texts(80, 3))  # seen in others
    prepare([*inputs, str(again)], tmp_path / "sets/x")
    prefixes = {name: tmp_path / f"sets/{name}" for name in ("x", "x_valid", "x_test")}
    hashes = {
        name: [piece_hash(each[:-1]) for each in documents(prefix)]
        for name, prefix in prefixes.items()
    }
    for name, low, high in (("x_valid", 0, 0.1), ("x_test", 0.1, 0.15), ("x", 0.15, 1)):
        assert all(low * 2**64 <= each < high * 2**64 for each in hashes[name])
    prepare([*inputs, str(again)], tmp_path / "all/x", HeldOut())
    everything = [piece_hash(each[:-1]) for each in documents(tmp_path / "all/x")]
    assert sorted(h for each in hashes.values() for h in each) == sorted(everything)
    # The shares are of documents: within four standard deviations of the binomial.
    total = sum(map(len, hashes.values()))
    for name, share in (("x_valid", 0.1), ("x_test", 0.05)):
        different = len(set(hashes[name])) / len({h for each in hashes.values() for h in each})
        assert abs(different - share) < 4 * (share * (1 - share) / total) ** 0.5 * 2**0.5


def test_excluded_sets_stay_out(tmp_path):
    values = texts(100)
    held = write_texts(tmp_path / "held.jsonl", values[:30])
    prepare(str(held), tmp_path / "sets/held", HeldOut())
    vocabulary = text_tools()["vocabulary"]
    config = HeldOutConfig(exclude=[str(tmp_path / "sets/held")])
    prepare(
        str(write_texts(tmp_path / "x.jsonl", values)),
        tmp_path / "sets/x",
        HeldOut.of(config, vocabulary),
        bad="stop",
    )
    kept = [text for text in values if text not in values[:30]]
    assert [each.tolist() for each in documents(tmp_path / "sets/x")] == laid_out(kept)
    rejected = [json.loads(line) for line in (tmp_path / "sets/x.rejected.jsonl").open()]
    assert len(rejected) == 100 - len(kept)
    assert rejected[0] == {
        "where": f"{tmp_path / 'x.jsonl'}:1",
        "reason": "it is in an excluded set",
        "is_bad": False,
    }


def test_bad_records_are_listed_or_end_the_run(tmp_path, inputs):
    prepare(inputs, tmp_path / "sets/x", HeldOut())
    listed = [json.loads(line) for line in (tmp_path / "sets/x.rejected.jsonl").open()]
    assert [each["where"] for each in listed] == [f"{inputs[0]}:8", f"{inputs[0]}:9", inputs[-1]]
    assert listed[0]["reason"].startswith("not valid JSON")
    assert "not a whole .zst" in listed[2]["reason"]
    assert read_info(tmp_path / "sets/x").num_documents >= 320
    with pytest.raises(UsageError, match=r"0\.jsonl:8: not valid JSON"):
        prepare(inputs, tmp_path / "other/x", HeldOut(), bad="stop")
    assert os.listdir(tmp_path / "other") == []


def test_shards_are_whole_or_nothing(tmp_path, inputs):
    for i in range(4):
        prepare(inputs, tmp_path / "sets/x", shard=Shard.parse(f"{i}/4"))
    prepare(inputs, tmp_path / "whole/x")
    prefixes = [tmp_path / f"sets/x-0000{i}-of-00004" for i in range(4)]
    full = [prefix for prefix in prefixes if read_info(prefix).num_documents]
    found = [each.tolist() for prefix in full for each in documents(prefix)]
    assert len(full) >= 3
    assert found == [each.tolist() for each in documents(tmp_path / "whole/x")]
    for wrong in ("4/4", "1", "-1/4", "a/b", "1/0"):
        with pytest.raises(UsageError, match="write i/n"):
            Shard.parse(wrong)


def test_a_shard_without_documents_says_so(tmp_path):
    path = str(write_texts(tmp_path / "x.csv", texts(3)))
    for i in range(2):
        prepare(path, tmp_path / "x", shard=Shard(i, 2))
    infos = [read_info(tmp_path / f"x-0000{i}-of-00002") for i in range(2)]
    assert [info.num_documents for info in infos] == [3, 0]
    assert infos[0].settings == infos[1].settings


def prepare_on_a_small_disk(run, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    from megatron_jam.config.cli import one_line_errors

    with one_line_errors():
        prepare_texts(run, HeldOut(), 1000, 0.0)


def test_a_full_disk_is_one_line_and_the_work_goes_on_later(tmp_path, inputs):
    prepare(inputs, tmp_path / "whole/x", HeldOut())
    run = Run(inputs=inputs, prefix=str(tmp_path / "sets/x"), bad="skip", workers=2)
    process = start(prepare_on_a_small_disk, run, 30_000)
    process.join()
    assert process.exitcode == 2
    assert not (tmp_path / "sets/x.json").exists()
    assert (tmp_path / "sets/.x.writing/state.json").exists()
    prepare(inputs, tmp_path / "sets/x", HeldOut(), workers=2)
    assert content_of(tmp_path / "sets") == content_of(tmp_path / "whole")


def test_what_cannot_be_tokenized_is_bad(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from megatron_jam.tokenizers.text import TextTokenizer
    from megatron_jam.tokenizers.vocabulary import JointVocabulary

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "cat": 4, "dog": 5}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = JointVocabulary.build(text_size=6, num_image_codes=4, num_sentinels=4)
    path = write_bytes(tmp_path / "x.csv", b"text\ncat dog\ncat bird\ndog\n")
    job = TextJob(tokenizer=TextTokenizer(raw), vocabulary=vocabulary)
    Run(inputs=str(path), prefix=str(tmp_path / "x"), workers=1, bad="skip").prepare(job)
    opened = open_set(tmp_path / "x", vocabulary)
    assert [opened.document(i).tolist() for i in range(2)] == [[4, 5, 2], [5, 2]]
    (listed,) = map(json.loads, (tmp_path / "x.rejected.jsonl").open())
    assert listed["where"] == f"{path}: row 2"


def test_wrong_settings_are_named(tmp_path, inputs):
    with pytest.raises(UsageError, match="workers must be at least 1"):
        prepare(inputs, tmp_path / "x", workers=0)
    for shares in ({"valid": 1.0}, {"a b": 0.1}, {"a": 0.6, "b": 0.4}):
        with pytest.raises(UsageError, match=r"held_out\.shares"):
            HeldOutConfig(shares=shares)
    path = write_bytes(tmp_path / "x.jsonl", b'{"text": ""}\n')
    with pytest.raises(UsageError, match="there is no document to write"):
        prepare(str(path), tmp_path / "x", HeldOut())
    assert pieces(text_tools()["vocabulary"], np.array([5, 6, 2]), "text")[0].tolist() == [5, 6]
    assert running.slice_prefix("x", "valid") == "x_valid"
