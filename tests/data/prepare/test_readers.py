import json

import numpy as np
import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.data.prepare import files, readers, records
from megatron_jam.data.prepare.files import Part
from megatron_jam.data.prepare.readers import expand, read_part, read_records, shard_of
from megatron_jam.data.prepare.records import BadRecord, text_of
from tests.data.prepare.small import texts, write_bytes, write_tar, write_texts

KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "tar", "tar.gz", "tar.zst", "parquet", "csv", "tsv.gz"]


def steps(path, position=None, *, num_records=3, start=0, stop=None):
    return list(read_part(Part(path, start, stop), position, num_records=num_records))


def found(step_list):
    return [each for step in step_list for each in step.chunk.records()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_texts(tmp_path, kind):
    values = texts(50)
    path = write_texts(tmp_path / f"x.{kind}", values)
    read = list(read_records(path))
    assert [text_of(each, "text") for each in read] == values
    assert all(str(path) in each.where for each in read)
    assert len({each.where for each in read}) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_from_any_place(tmp_path, kind):
    path = write_texts(tmp_path / f"x.{kind}", texts(50))
    whole = steps(path)
    assert len(whole) == 17
    for number, step in enumerate(whole):
        rest = steps(path, step.position)
        assert found(rest) == found(whole[number + 1 :])
        assert [each.position for each in rest] == [each.position for each in whole[number + 1 :]]


def test_chunks_of_lines_are_as_large_as_is_allowed(tmp_path, monkeypatch):
    path = write_texts(tmp_path / "x.jsonl", texts(50))
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    whole = steps(path, num_records=0)
    assert len(whole) > 5
    assert b"".join(each.chunk.data for each in whole) == path.read_bytes()
    for number, step in enumerate(whole):
        assert found(steps(path, step.position, num_records=0)) == found(whole[number + 1 :])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_are_the_whole(tmp_path, count):
    paths = [
        write_texts(tmp_path / f"{i}.{kind}", texts(size, seed=i))
        for i, (kind, size) in enumerate(zip(KINDS, [40, 3, 9, 30, 4, 1, 33, 5, 8], strict=True))
    ]
    whole = [each for path in paths for each in found(steps(path))]
    parts = [part for i in range(count) for part in shard_of(paths, (i, count))]
    shards = [
        found(steps(part.path, start=part.start, stop=part.stop, num_records=size))
        for part, size in zip(parts, np.arange(len(parts)) % 4, strict=True)
    ]
    assert [each for shard in shards for each in shard] == whole
    assert sum(len(shard) > 0 for shard in shards) >= min(count, 9)


def test_shards_share_lines_of_any_length(tmp_path):
    lines = [json.dumps({"text": "x" * n}) for n in (1, 5000, 2, 3, 9000, 1)]
    path = write_bytes(tmp_path / "x.jsonl", "\n".join(lines).encode())  # no last line break
    for count in (2, 5, 100):
        parts = [part for i in range(count) for part in shard_of([path], (i, count))]
        read = [
            each
            for part in parts
            for each in found(steps(*part[:1], None, start=part[1], stop=part[2]))
        ]
        assert [each.key for each in read] == list("123456")


def test_patterns_folders_and_their_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "pictures/metadata.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_texts(tmp_path / name, texts(2))
    given = [str(tmp_path / "pictures"), str(tmp_path / "*.jsonl")]
    assert [path.name for path in expand(given)] == ["metadata.csv", "a.jsonl", "b.jsonl"]
    for wrong, message in (
        (tmp_path / "*.parquet", "no file has such a name"),
        (tmp_path, "is a folder: it needs one of metadata.jsonl"),
        (tmp_path / "x.parquet.gz", "of no known kind"),
    ):
        with pytest.raises(UsageError, match=message.replace("*", r"\*")):
            expand([str(wrong)])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.jsonl.gz", "not a whole .gz file"),
        ("x.jsonl.zst", "not a whole .zst file"),
        ("x.tar", "not a whole .tar file"),
        ("x.tar.gz", "not a whole .gz file"),
        ("x.parquet", "not a whole .parquet file"),
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_file_that_was_cut_off_is_named(tmp_path, name, reason, share):
    path = write_texts(tmp_path / name, texts(300))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadRecord, match=reason):
        list(read_records(path))


def test_records_before_a_cut_are_kept(tmp_path):
    path = write_texts(tmp_path / "x.tar", texts(20))
    whole = found(steps(path, num_records=4))
    path.write_bytes(path.read_bytes()[:25_000])
    kept = []

    def read():
        for step in read_part(Part(path, 0, None), None, num_records=4):
            kept.extend(step.chunk.records())

    with pytest.raises(BadRecord, match=r"not a whole \.tar"):
        read()
    assert kept == whole[: len(kept)]
    assert len(kept) >= 10


def test_a_tar_that_ends_between_two_files_is_not_whole(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.txt": b"1", "b.txt": b"2"})
    path.write_bytes(path.read_bytes()[:1024])  # a's header and content
    with pytest.raises(BadRecord, match="no end-of-archive mark"):
        list(read_records(path))


def test_lines_without_end_are_left_out(tmp_path, monkeypatch):
    for module in (readers, records):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 3000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    lines = [json.dumps({"text": "x" * n}).encode() for n in (10, 2000, 50_000, 5, 3001, 7)]
    path = write_bytes(tmp_path / "x.jsonl.gz", b"\n".join(lines) + b"\n")
    for num_records in (0, 1, 2, 10):
        read = found(steps(path, num_records=num_records))
        assert [getattr(each, "key", None) for each in read] == ["1", "2", None, "4", None, "6"]
        bad = [each.rejected for each in read if isinstance(each, BadRecord)]
        assert [each.where for each in bad] == [f"{path}:3", f"{path}:5"]
        assert all("longer than 3000 bytes" in each.reason for each in bad)


def test_a_table_with_missing_columns_is_named(tmp_path):
    path = write_bytes(tmp_path / "x.csv", b'text,source\na,b\nonly one\n"c\n",d\n')
    read = found(steps(path))
    assert [getattr(each, "fields", None) for each in read] == [
        {"text": "a", "source": "b"},
        None,
        {"text": "c\n", "source": "d"},
    ]
    assert read[1].rejected.reason == "1 columns, not 2"


def test_empty_files_are_named(tmp_path):
    for name, data in (("x.jsonl", b""), ("y.jsonl", b"\n \n"), ("z.csv", b"text\n")):
        with pytest.raises(BadRecord, match="the file is empty"):
            list(read_records(write_bytes(tmp_path / name, data)))
    with pytest.raises(BadRecord, match="the file is empty"):
        list(read_records(write_tar(tmp_path / "x.tar", {})))


def test_a_bad_record_travels_to_a_worker(tmp_path):
    import pickle

    path = write_bytes(tmp_path / "x.csv", b"text\na\nb,c\n")
    (step,) = steps(path)
    back = pickle.loads(pickle.dumps(step.chunk))
    assert [type(each) for each in back.records()] == [type(each) for each in found([step])]
    assert list(back.records())[1].rejected == found([step])[1].rejected
    assert files.CHUNK_ROWS == 256
