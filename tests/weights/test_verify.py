"""A folder that was changed is named, whatever was changed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_jam.config.errors import UsageError
from megatron_jam.weights.folder import INDEX, PROVENANCE, WeightsFolder
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
