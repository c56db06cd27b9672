"""Write a weights folder's logits for given token ids."""

from pathlib import Path
from typing import Literal

import numpy as np

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, temporary_name, writing
from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.evaluation.logits import folder_logits, read_array
from megatron_jam.parallel.device import DTYPES
from megatron_jam.parallel.world import start_world, stop_world


def main(
    weights: Path,
    *,
    ids: Path | None = None,
    out: Path | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    parallel: ParallelConfig = ParallelConfig(),
) -> None:
    """Compute logits, to be compared with those of another program.

    Args:
        weights: weights folder.
        ids: .npy of token ids, int64 [batch, sequence].
        out: .npy to write, float32 [batch, sequence, vocabulary].
        precision: of weights and activations.
        parallel: layout, under torchrun.
    """
    if ids is None or out is None:
        raise UsageError("name the ids to read and the file to write: --ids IDS.npy --out OUT.npy")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent} is no folder: make it first")
    if out.is_dir():
        raise UsageError(f"{out} is a folder: name the file to write in it")
    if out.resolve() == ids.resolve():
        raise UsageError(f"--out {out} would replace the ids: name another file to write")
    if out.resolve().parent == weights.resolve():
        raise UsageError(f"--out {out} lies in the weights folder: name a file beside it")
    given = read_array(ids)
    world = start_world(parallel)
    found = folder_logits(weights, given, world, dtype=DTYPES[precision])
    if found is not None:
        temporary = temporary_name(out)
        with writing(out), temporary.open("wb") as target:
            np.save(target, found)
        publish(temporary, out)
        logger.info("wrote %s: %s", out, list(found.shape))
    stop_world()


if __name__ == "__main__":
    run_command(main)
