"""Weights folders: what is written is read back bit for bit, whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import PartFolder
from megatron_jam.models.parameters import parameter_table
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import INDEX, VOCABULARY, FolderWriter, WeightsFolder
from megatron_jam.weights.load import check_tensors
from tests.helpers.pico import pico_config, pico_folder, pico_tensors, pico_vocabulary

CONFIG = pico_config("tower", num_layers=2, bias=True, affine_norm=True)
SHAPES = {entry.name: entry.shape for entry in parameter_table(CONFIG)}
NAMES = list(SHAPES)
QUERY = "layers.0.main.attention.q.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocabulary.json and tokenizer.json."""
    return pico_folder(tmp_path_factory.mktemp("source") / "pico", CONFIG)


def writer(path: Path, source: Path, dtype: torch.dtype, **kwargs: int) -> FolderWriter:
    return FolderWriter(path, config=CONFIG, source=source, shapes=SHAPES, dtype=dtype, **kwargs)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_several_files_come_back_bit_for_bit(
    dtype: torch.dtype, source: Path, tmp_path: Path
) -> None:
    tensors = {name: t.to(dtype) for name, t in pico_tensors(CONFIG, seed=3).items()}
    with writer(tmp_path / "model", source, dtype, file_bytes=20_000) as out:
        for name in SHAPES:
            out.write(name, tensors[name])
        out.finish({"made_by": "a test"})
    folder = WeightsFolder(tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) >= 3
    assert [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    # The token table alone is larger than a file may be, so it is alone.
    assert list(load_file(files[0])) == ["embedding.tokens.weight"]
    assert all(f.stat().st_size < 20_000 + 4096 for f in files[1:])
    assert folder.names == list(SHAPES)
    assert folder.config == CONFIG
    loaded = {name: t for file in files for name, t in load_file(file).items()}
    for name, tensor in tensors.items():
        for value in (folder.read(name), loaded[name]):
            assert value.dtype is dtype
            assert value.shape == tensor.shape
            assert bits(value) == bits(tensor)
        assert folder.shape(name) == SHAPES[name]
        assert folder.provenance["sha256"][name] == hashlib.sha256(bits(tensor)).hexdigest()
    assert folder.provenance["made_by"] == "a test"
    assert folder.provenance["dtype"] == str(dtype).removeprefix("torch.")
    small = folder.provenance["files_sha256"]
    assert set(small) == {"config.json", VOCABULARY, "tokenizer.json"}
    for name, digest in small.items():
        content = (tmp_path / "model" / name).read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()


def test_slices(source: Path) -> None:
    folder = WeightsFolder(source)
    whole = folder.read(QUERY)
    assert torch.equal(folder.read(QUERY, 0, 8, 24), whole[8:24])
    assert torch.equal(folder.read(QUERY, 1, 16, 32), whole[:, 16:])
    assert folder.read(QUERY, 0, 32, 32).shape == (0, 32)
    bias = "layers.0.main.attention.q.bias"
    assert torch.equal(folder.read(bias, 0, 3, 5), folder.read(bias)[3:5])


def test_writer_casts_and_takes_views(source: Path, tmp_path: Path) -> None:
    """float64 and transposed tensors in, bf16 rows out."""
    tensors = pico_tensors(CONFIG)
    with writer(tmp_path / "model", source, torch.bfloat16) as out:
        for name in SHAPES:
            out.write(
                name, tensors[name].mT.contiguous().mT if len(SHAPES[name]) > 1 else tensors[name]
            )
        out.finish({})
    folder = WeightsFolder(tmp_path / "model")
    assert all(torch.equal(folder.read(n), t.bfloat16()) for n, t in tensors.items())


@pytest.mark.parametrize("is_there", [False, True])
def test_interrupted_writer_leaves_nothing_new(
    is_there: bool, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    if is_there:
        with writer(path, source, torch.float32) as out:
            for name, tensor in pico_tensors(CONFIG, seed=1).items():
                out.write(name, tensor)
            out.finish({})
    before = files_of(path) if is_there else {}
    first = NAMES[0]

    def interrupted() -> None:
        with writer(path, source, torch.float32) as out:
            out.write(first, torch.zeros(SHAPES[first]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    # Neither is a folder left that was never finished.
    with writer(path, source, torch.float32) as out:
        out.write(first, torch.zeros(SHAPES[first]))
    assert [p.name for p in tmp_path.iterdir()] == (["model"] if is_there else [])
    assert not is_there or files_of(path) == before


def test_leftovers_of_a_killed_writer_do_not_matter(source: Path, tmp_path: Path) -> None:
    part = tmp_path / ".model.part"
    part.mkdir()
    (part / "model-00009-of-00009.safetensors").write_bytes(b"half")
    with writer(tmp_path / "model", source, torch.float32) as out:
        for name, tensor in pico_tensors(CONFIG).items():
            out.write(name, tensor)
        out.finish({})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model/model-00009-of-00009.safetensors").exists()


@pytest.mark.parametrize(
    ("times", "shape", "message"),
    [
        (2, SHAPES[NAMES[0]], "embedding.tokens.weight was written before"),
        (1, (3,), "embedding.tokens.weight: shape"),
        (1, SHAPES[NAMES[0]], "tensors are missing"),
    ],
    ids=["twice", "shape", "missing"],
)
def test_writer_keeps_to_its_plan(
    times: int, shape: tuple[int, ...], message: str, source: Path, tmp_path: Path
) -> None:
    def write() -> None:
        with writer(tmp_path / "model", source, torch.float32) as out:
            for _ in range(times):
                out.write(NAMES[0], torch.zeros(shape))
            out.finish({})

    with pytest.raises(AssertionError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


def test_writer_needs_a_tokenizer_before_it_starts(tmp_path: Path) -> None:
    pico_vocabulary().save(tmp_path / VOCABULARY)
    with pytest.raises(UsageError, match=r"has no tokenizer.json"):
        writer(tmp_path / "model", tmp_path, torch.float32)
    assert [p.name for p in tmp_path.iterdir()] == [VOCABULARY]


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return pico_folder(tmp_path / "copy", CONFIG)


def edit_index(folder: Path, *, drop: str = "", add: str = "") -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    file = index["weight_map"].pop(drop, "model-00001-of-00001.safetensors")
    if add:
        index["weight_map"][add] = file
    path.write_text(json.dumps(index))


def test_missing_and_unknown_tensors_are_named(copy: Path) -> None:
    check_tensors(WeightsFolder(copy))
    edit_index(copy, drop=QUERY)
    with pytest.raises(UsageError, match=rf"missing \['{QUERY}'\], unknown none"):
        check_tensors(WeightsFolder(copy))
    edit_index(copy, add="layers.7.main.gate.weight")
    with pytest.raises(UsageError, match=r"unknown \['layers.7.main.gate.weight'\]"):
        check_tensors(WeightsFolder(copy))
    with pytest.raises(UsageError, match=r"has no tensor nothing\.weight"):
        WeightsFolder(copy).read("nothing.weight")


def test_wrong_shape_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["max_positions"] = 100
    (copy / "config.json").write_text(json.dumps(config))
    message = r"embedding.positions.weight has shape \(66, 32\), config.json asks \(102, 32\)"
    with pytest.raises(UsageError, match=message):
        check_tensors(WeightsFolder(copy))


def test_vocabulary_of_another_size_is_refused(copy: Path) -> None:
    other = JointVocabulary.build(text_size=300, num_image_codes=17, num_sentinels=4)
    other.save(copy / VOCABULARY)
    with pytest.raises(UsageError, match=r"vocabulary.json has 323 ids, .* vocab_size 322"):
        WeightsFolder(copy)


def test_vocabulary_of_the_same_size_is_not_the_same(source: Path) -> None:
    folder = WeightsFolder(source)
    folder.require_vocabulary(pico_vocabulary(), "the same")
    other = JointVocabulary.build(text_size=300, num_image_codes=15, num_sentinels=5)
    assert other.size == folder.vocabulary.size
    with pytest.raises(UsageError, match="the vocabulary of sets/other is not the one of"):
        folder.require_vocabulary(other, "sets/other")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model-00001-of-00001.safetensors", None, "is missing, which holds embedding.tokens"),
        ("model-00001-of-00001.safetensors", b"\xff" * 64, "is damaged"),
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"[]", "config.json is damaged"),
        ("provenance.json", b"", "provenance.json is damaged"),
        ("provenance.json", b"[]", "provenance.json is damaged"),
        (INDEX, b"{,}", "index.json is damaged"),
        (INDEX, b"{}", "index.json is damaged: its weight_map does not give each tensor's file"),
        (INDEX, b'{"weight_map": null}', "index.json is damaged: its weight_map"),
        (INDEX, b'{"weight_map": ["a"]}', "index.json is damaged: its weight_map"),
        (INDEX, b'{"weight_map": {"a": 1}}', "index.json is damaged: its weight_map"),
        (INDEX, rb'{"weight_map": {"a": "\u0000"}}', "index.json is damaged: its weight_map"),
        ("config.json", b"[" * 100_000, "config.json is damaged"),
        ("config.json", b'{"size": 1}', "config.json: unknown key `size`"),
        (INDEX, None, f"is not a weights folder: it has no {INDEX}"),
    ],
)
def test_damage_is_one_line(copy: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        check_tensors(WeightsFolder(copy))
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_give_a_tensor_is_named(copy: Path) -> None:
    save_file({"other": torch.ones(1)}, copy / "other.safetensors")
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"][QUERY] = "other.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    folder = WeightsFolder(copy)
    for read in (folder.read, folder.shape, folder.stored):
        with pytest.raises(UsageError, match=rf"other\.safetensors does not give {QUERY}"):
            read(QUERY)


@pytest.mark.parametrize("recorded", [None, [], {}, {QUERY: 1}])
def test_a_provenance_without_hashes_is_named(recorded: object, copy: Path) -> None:
    path = copy / "provenance.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    path.write_text(json.dumps(kept if recorded is None else {**kept, "sha256": recorded}))
    with pytest.raises(UsageError, match=r"provenance\.json has no sha256 of "):
        WeightsFolder(copy).stored(QUERY)
    with pytest.raises(UsageError, match=r"provenance\.json has no sha256 of "):
        _ = WeightsFolder(copy).sha256


def test_cut_file_is_damaged(copy: Path) -> None:
    path = copy / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match="is damaged"):
        check_tensors(WeightsFolder(copy))


def test_one_program_at_a_time_writes_a_folder(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    with writer(path, source, torch.float32) as out:
        with (
            pytest.raises(UsageError, match=r"another program is writing .*model: wait"),
            writer(path, source, torch.float32),
        ):
            pass
        for name, tensor in pico_tensors(CONFIG).items():
            out.write(name, tensor)
        out.finish({})
    assert torch.equal(WeightsFolder(path).read(QUERY), pico_tensors(CONFIG)[QUERY].float())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_part_folder_that_has_its_name_by_now_is_not_taken(tmp_path: Path) -> None:
    """Another program finishes between this one's opening of the folder and its lock."""
    first, late = PartFolder(tmp_path / "model"), PartFolder(tmp_path / "model")
    first.open()
    late._descriptor = os.open(late.path, os.O_RDONLY)
    (first.path / "file").write_text("x")
    first.path.rename(tmp_path / "model")
    first.close()
    late.close()
    assert (tmp_path / "model/file").read_text() == "x"


def test_a_model_of_hugging_face_is_neither_read_nor_replaced(copy: Path, source: Path) -> None:
    (copy / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="not replaced, as it is a model of Hugging Face"):
        writer(copy, source, torch.float32)
    (copy / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(UsageError, match=r"copy is a model of Hugging Face.*convert_hf.py import"):
        WeightsFolder(copy)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor(1.0), "does not give"),
        (torch.ones(4, 4, dtype=torch.int8), "is torch.int8, quantised or no weight"),
    ],
)
def test_what_is_no_weight_is_named(copy: Path, tensor: Tensor, message: str) -> None:
    (file,) = copy.glob("*.safetensors")
    save_file({name: tensor.clone() for name in NAMES}, file)
    with pytest.raises(UsageError, match=message):
        _ = WeightsFolder(copy).dtype
