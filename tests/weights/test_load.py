"""Folder -> ranks -> folder is the identity, whatever the layout."""

from pathlib import Path

import pytest
import torch

from megatron_jam.config.model import ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import TOKENS
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import export_weights, load_weights, whole_weights
from tests.helpers.pico import pico_config, pico_folder
from tests.helpers.pool import WorkerPool

LAYOUTS = {
    "one": (ParallelConfig(), 1),
    "dp2": (ParallelConfig(), 2),
    # 322 rows do not divide by 4: two are padding.
    "tp4": (ParallelConfig(tensor=4), 1),
    "tp2-pp2": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1),
    "pp2-interleaved": (ParallelConfig(pipeline=2, interleave=2), 1),
    "pp2-dp2": (ParallelConfig(pipeline=2), 2),
}


def pass_through(world: World, source: Path, target: Path, dtype: torch.dtype) -> dict[str, float]:
    """Load and export; return what the token table's padding holds on this rank."""
    folder = WeightsFolder(source)
    chunks = [
        JamModel(folder.config, world, dtype=dtype, chunk=i)
        for i in range(world.parallel.interleave)
    ]
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))  # what is not loaded shows
    load_weights(chunks, folder, world)
    export_weights(
        whole_weights(chunks, world),
        folder.config,
        world,
        target,
        source=source,
        dtype=dtype,
        provenance={"source": "pico"},
    )
    padding = {}
    for chunk in chunks:
        for holder in holders(chunk):
            if holder.key == TOKENS:
                first = world.tensor.rank * holder.parameter.shape[0]
                behind = max(0, folder.config.vocab_size - first)
                padding[f"{holder.is_copy}"] = float(holder.parameter[behind:].abs().sum())
    return padding


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """A JAM-Cross with every kind of tensor."""
    root = tmp_path_factory.mktemp("load")
    config: ModelConfig = pico_config("cross", bias=True, affine_norm=True)
    assert config.vocab_size % 4
    return {
        dtype: pico_folder(root / str(dtype), config, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_is_the_identity(
    pool: WorkerPool,
    layout: str,
    dtype: torch.dtype,
    sources: dict[torch.dtype, Path],
    tmp_path: Path,
) -> None:
    parallel, data = LAYOUTS[layout]
    source, target = sources[dtype], tmp_path / "again"
    ranks = pool.run(pass_through, parallel, source, target, dtype, data=data)
    assert all(value == 0 for held in ranks for value in held.values())
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in target.iterdir()) == names
    for name in names:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_missing_tensor_is_named_before_anything_is_loaded(
    pool: WorkerPool, tmp_path: Path
) -> None:
    """The folder of a tower, with the configuration of one more layer."""
    path = pico_folder(tmp_path / "tower", pico_config("tower", num_layers=2))
    text = (path / "config.json").read_text().replace('"num_layers": 2', '"num_layers": 3')
    (path / "config.json").write_text(text)
    message = r"UsageError: .*missing \['layers.2.main.attention.k.weight'"
    with pytest.raises(RuntimeError, match=message):
        pool.run(pass_through, ParallelConfig(), path, tmp_path / "again", torch.float32)
    assert not (tmp_path / "again").exists()
