"""Files of torch.save are read without running anything that they name."""

import functools
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.weights.metaseq.convert import read_metaseq
from megatron_jam.weights.metaseq.pickles import TorchFile, plain
from tests.helpers.pico import pico_source


class Hostile:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple]:
        return self.call


class Unknown:
    """A class that is no part of any checkpoint."""


HOSTILE = {
    "posix.system": Hostile(os.system, "touch HACKED"),
    "builtins.eval": Hostile(eval, "open('HACKED', 'w')"),
    "builtins.exec": Hostile(exec, "open('HACKED', 'w')"),
    "builtins.getattr": Hostile(getattr, "text", "upper"),
    "test_pickles.Unknown": Unknown(),
    "torch.load": Hostile(torch.load, "HACKED"),
    "pickle.loads": Hostile(pickle.loads, b"x"),
    # A call of what a call gave. Protocol 2 has Python 2's name of map, which comes first.
    "itertools.imap": Hostile(list, Hostile(map, Hostile(os.unlink, "a.pt"), [])),
    "functools.partial": Hostile(functools.partial(os.system, "touch HACKED")),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["cfg", "model", "extra_state"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_run_nothing(
    name: str, place: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"cfg": {}, "model": {"decoder.version": torch.ones(1)}, "extra_state": {}}
    values[place] = {"deep": [HOSTILE[name]]}
    torch.save(values, "a.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=2)
    with pytest.raises(UsageError, match=f"a.pt names .*{name.split('.')[-1]}.* is refused"):
        TorchFile(Path("a.pt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


def test_names_with_dots_reach_nothing(tmp_path: Path) -> None:
    """Protocol 4 may name an attribute of an attribute; the stand-ins have none to give."""
    code = b"\x80\x04\x8c\x0eomegaconf.base\x8c\x16Any.__init__.__globals\x93."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", code)
    with pytest.raises(UsageError, match="is refused"):
        TorchFile(tmp_path / "a.pt")


def test_settings_without_end_and_numbers_from_nothing(tmp_path: Path) -> None:
    endless: list = []
    endless.append(endless)
    torch.save({"cfg": {"model": endless}, "model": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="settings are nested without end"):
        read_metaseq(str(tmp_path / "a.pt"), pico_source(tmp_path))
    torch.save({"model": {"a": torch.ones(1).expand(10**6)}}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="a tensor has more numbers than are stored"):
        TorchFile(tmp_path / "a.pt")


def test_numpy_values_are_kept_out_of_the_way(tmp_path: Path) -> None:
    import numpy as np

    values = {"loss": np.float64(1.5), "cache": np.arange(3), "model": {"a": torch.ones(2)}}
    torch.save(values, tmp_path / "a.pt", pickle_protocol=2)
    file = TorchFile(tmp_path / "a.pt")
    assert torch.equal(file.values["model"]["a"].read(), torch.ones(2))
    assert plain(file.values["loss"]) is None


def test_views_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    values = {"all": base, "turned": base.t(), "part": base[1:3, 2:], "empty": base[:0]}
    for zipped in (True, False):
        torch.save(values, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        file = TorchFile(tmp_path / "a.pt")
        for name, value in values.items():
            assert torch.equal(file.values[name].read(), value), name
            assert file.values[name].shape == tuple(value.shape)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("left", [0, 100, 20_000, -1])
def test_a_damaged_file_is_named(left: int, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    values = {"model": {"a": torch.ones(9000)}}
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with pytest.raises(UsageError, match=r"a\.pt is no file of torch\.save, or is damaged"):
        TorchFile(path)
