"""A folder's logits are the plain reference's under every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.evaluation.logits import folder_logits, read_array
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.commands import fails, failure, tool
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool

LAYOUTS = {
    "tp4": (ParallelConfig(tensor=4, sequence=True), 1),
    "pp2": (ParallelConfig(pipeline=2), 1),
    "pp2-interleaved": (ParallelConfig(pipeline=2, interleave=2), 1),
    "tp2-pp2-dp2": (ParallelConfig(tensor=2, pipeline=2), 2),
}
IDS = np.random.default_rng(0).integers(0, 322, size=(3, 20))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A JAM-Cross, and a Llama whose rows TP 4 does not divide."""
    root = tmp_path_factory.mktemp("logits")
    configs = {"cross": pico_config("cross", bias=True), "llama": pico_config("tower", **LLAMA)}
    return {n: pico_folder(root / n, c, dtype=torch.float32) for n, c in configs.items()}


def compute(world: World, path: Path) -> np.ndarray | None:
    return folder_logits(path, IDS, world)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("llama", "tp4"), ("llama", "pp2"), ("cross", "pp2-interleaved"), ("cross", "tp2-pp2-dp2")]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("llama", "pp2-interleaved"), ("cross", "tp4"), ("cross", "pp2"))
    ],
)
def test_equal_the_reference(
    kind: str, layout: str, folders: dict[str, Path], pool: WorkerPool
) -> None:
    parallel, data = LAYOUTS[layout]
    found, *others = pool.run(compute, parallel, folders[kind], data=data)
    assert others == [None] * len(others)
    folder = WeightsFolder(folders[kind])
    due = reference_logits(folder.config, folder.read, torch.from_numpy(IDS)).numpy()
    assert found.dtype == np.float32
    assert found.shape == (3, 20, 322)
    assert np.abs(found - due).max() < 1e-4 * np.abs(due).max()


def test_the_command_writes_them(folders: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    arguments = (str(folders["llama"]), "--ids", "ids.npy", "--out", "out.npy")
    done = tool("logits", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = WeightsFolder(folders["llama"])
    due = reference_logits(folder.config, folder.read, torch.from_numpy(IDS)).numpy()
    assert np.abs(np.load(tmp_path / "out.npy") - due).max() < 1e-4 * np.abs(due).max()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], r"ids are int64 \[20\]; give int64 \[batch, sequence\]"),
        (IDS.astype(np.int32), r"ids are int32 \[3, 20\]"),
        (IDS + 300, "ids reach from 3.. to .*; .* knows 0 to 321"),
        (np.zeros((1, 65), dtype=np.int64), "ids have 65 positions; .* has max_positions 64"),
    ],
)
def test_ids_that_the_model_cannot_read(
    ids: np.ndarray, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", ids)
    arguments = (str(folders["llama"]), "--ids", "ids.npy", "--out", "out.npy")
    fails(tool("logits", *arguments, cwd=tmp_path), message)
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("content", ["text", "empty", "archive", "objects", "cut"])
def test_a_file_that_is_no_array(content: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    if content in ("text", "empty"):
        path.write_text("no array" if content == "text" else "")
    elif content == "archive":
        np.savez(path.with_suffix(".npz"), ids=IDS)
        path.with_suffix(".npz").rename(path)
    else:
        np.save(path, IDS.astype(object) if content == "objects" else IDS)
        path.write_bytes(path.read_bytes()[:-8])
    arguments = (str(folders["llama"]), "--ids", "ids.npy", "--out", "out.npy")
    fails(tool("logits", *arguments, cwd=tmp_path), "ids.npy is no .npy array")


def test_a_folder_is_not_written_over(folders: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    (tmp_path / "out").mkdir()
    arguments = (str(folders["llama"]), "--ids", "ids.npy", "--out", "out")
    fails(tool("logits", *arguments, cwd=tmp_path), "out is a folder: name the file to write in it")
    assert {path.name for path in tmp_path.iterdir()} == {"ids.npy", "out"}


def header(text: str) -> bytes:
    """The beginning of an .npy file, numpy's format 1.0."""
    return b"\x93NUMPY\x01\x00\x76\x00" + text.encode().ljust(117) + b"\n"


@pytest.mark.parametrize(
    "shape", ["(1000000000000, 100)", "(2305843009213693952, 8)", f"({'9' * 40}, 1)", "(-3, 1)"]
)
def test_a_header_that_claims_more_than_there_is(shape: str, tmp_path: Path) -> None:
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"
    (tmp_path / "ids.npy").write_bytes(header(text) + bytes(16))
    with pytest.raises(UsageError, match=r"ids\.npy is no \.npy array: .") as caught:
        read_array(tmp_path / "ids.npy")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["(" * 110, "{'descr': ", "'\\x'", "{[]: 1}", "\n\n  x\n y", "-" * 117]
)
def test_a_header_that_is_no_python(text: str, tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_bytes(header(text))
    with pytest.raises(UsageError, match=r"ids\.npy is no \.npy array: .") as caught:
        read_array(tmp_path / "ids.npy")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("out", ["ids.npy", "../work/ids.npy", "link.npy"])
def test_the_ids_are_not_written_over(
    out: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    np.save("ids.npy", IDS)
    Path("link.npy").symlink_to("ids.npy")
    told = failure(capsys, "logits", folders["llama"], "--ids", "ids.npy", "--out", out)
    assert "would replace the ids: name another file to write" in told
    assert np.array_equal(np.load("ids.npy"), IDS)


def test_no_file_of_the_weights_is_written_over(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    before = {path: path.read_bytes() for path in folders["llama"].iterdir()}
    (tensors,) = folders["llama"].glob("*.safetensors")
    for out in (tensors, folders["llama"] / "out.npy"):
        told = failure(
            capsys, "logits", folders["llama"], "--ids", tmp_path / "ids.npy", "--out", out
        )
        assert f"--out {out} lies in the weights folder: name a file beside it" in told
    assert {path: path.read_bytes() for path in folders["llama"].iterdir()} == before
