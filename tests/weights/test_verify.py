"""A folder that was changed is named, whatever was changed."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.fusion.fuse import fuse
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import INDEX, PROVENANCE, TOKENIZER, VOCABULARY, WeightsFolder
from megatron_jam.weights.verify import verify
from tests.helpers.commands import fails, tool
from tests.helpers.pico import pico_config, pico_folder

CONFIG = pico_config("tower", num_layers=2, bias=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pico_folder(tmp_path / "model", CONFIG, dtype=torch.bfloat16)


def test_an_untouched_folder_passes(folder: Path, tmp_path: Path) -> None:
    assert verify(folder) == len(WeightsFolder(folder).names)
    done = tool("verify", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all as they were written" in done.stderr


def test_a_changed_bit_is_found(folder: Path, tmp_path: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["layers.1.main.ffn.fc2.weight"].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, path)
    message = "layers.1.main.ffn.fc2.weight is not what was written, by its sha256"
    fails(tool("verify", str(folder), cwd=tmp_path), message)


def test_a_missing_or_unknown_tensor_is_found(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    index = json.loads((folder / INDEX).read_text())
    place = index["weight_map"].pop("layers.0.main.ffn.fc1.bias")
    index["weight_map"]["extra"] = place
    tensors["extra"] = tensors.pop("layers.0.main.ffn.fc1.bias")
    save_file(tensors, path)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"missing \['layers.0.*'\], unknown \['extra'\]"):
        verify(folder)


def test_a_hash_that_nobody_recorded_is_found(folder: Path) -> None:
    values = json.loads((folder / PROVENANCE).read_text())
    del values["sha256"]["embedding.tokens.weight"]
    (folder / PROVENANCE).write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"has no sha256 of embedding\.tokens\.weight"):
        verify(folder)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def shard(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def say_another_dtype(folder: Path) -> None:
    """In the head alone: the bytes, and so their sha256, stay."""
    content = shard(folder).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = content[8 : 8 + size].replace(b'"BF16"', b'"F16" ')
    shard(folder).write_bytes(content[:8] + head + content[8 + size :])


def other_codes(folder: Path) -> None:
    other = JointVocabulary.build(text_size=300, num_image_codes=15, num_sentinels=5)
    assert other.size == CONFIG.vocab_size
    other.save(folder / VOCABULARY)


def other_heads(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["towers"]["main"].update(num_heads=8))


def add_a_tensor(folder: Path) -> None:
    save_file({**load_file(shard(folder)), "stray": torch.ones(3)}, shard(folder))


def add_a_file(folder: Path) -> None:
    save_file({"stray": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")


def misplace(folder: Path) -> None:
    add_a_file(folder)
    place = {"layers.1.main.ffn.fc2.bias": "model-00002-of-00002.safetensors"}
    edit(folder / INDEX, lambda values: values["weight_map"].update(place))


def move_out(folder: Path) -> None:
    shard(folder).rename(folder.parent / "outside.safetensors")
    tensors = WeightsFolder(folder).names
    place = dict.fromkeys(tensors, "../outside.safetensors")
    edit(folder / INDEX, lambda values: values.update(weight_map=place))


def say_one_more(folder: Path) -> None:
    edit(folder / PROVENANCE, lambda values: values["sha256"].update(lost="0" * 64))


CHANGES = {
    "outside": (move_out, "weight_map does not give each tensor's file in its folder"),
    "lost": (say_one_more, r"lacks lost, whose sha256 provenance\.json has"),
    "dtype": (say_another_dtype, r"embedding\.\S+ is float16, not bfloat16"),
    "no tokenizer": (lambda f: (f / TOKENIZER).unlink(), r"tokenizer\.json is missing"),
    "tokenizer": (lambda f: (f / TOKENIZER).write_text("{garbage"), "tokenizer.json is not what"),
    "vocabulary": (other_codes, "vocabulary.json is not what was written, by its sha256"),
    "config": (other_heads, "config.json is not what was written, by its sha256"),
    "tensor": (add_a_tensor, "holds stray, which model.safetensors.index.json lacks"),
    "file": (add_a_file, "00002.safetensors is a file that model.safetensors.index.json lacks"),
    "place": (misplace, "00002.safetensors does not give layers.1.main.ffn.fc2.bias"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_change_is_found(change: str, folder: Path) -> None:
    spoil, message = CHANGES[change]
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        verify(folder)


@pytest.mark.parametrize("record", [{}, []])
def test_a_record_that_is_not_whole_is_found(record: object, folder: Path) -> None:
    edit(folder / PROVENANCE, lambda values: values.update(files_sha256=record))
    with pytest.raises(UsageError, match=r"has no sha256 of config\.json"):
        verify(folder)


def test_a_renamed_folder_passes(folder: Path) -> None:
    verify(folder.rename(folder.with_name("another")))


def test_small_files_beside_are_checked(tmp_path: Path) -> None:
    """The plan of the ids that a fusion writes."""
    paths = {name: pico_folder(tmp_path / name, CONFIG) for name in ("text", "image")}
    fuse(FusionRecipe(method="uniform", output=tmp_path / "child", **paths))
    verify(tmp_path / "child")
    with (tmp_path / "child/vocabulary_plan.tsv").open("a") as file:
        file.write("one more")
    with pytest.raises(UsageError, match=r"plan\.tsv is not what was written"):
        verify(tmp_path / "child")


def test_a_folder_without_these_records_is_checked_as_far_as_it_goes(
    folder: Path, tmp_path: Path
) -> None:
    edit(folder / PROVENANCE, lambda values: [values.pop(n) for n in ("dtype", "files_sha256")])
    done = tool("verify", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is of an older version, without dtype and sha256 of the small files" in done.stderr
    (folder / TOKENIZER).write_text("{garbage")
    fails(tool("verify", str(folder), cwd=tmp_path), "tokenizer.json is not a tokenizer")
