"""Which samples a skipped step had: a line in the log, all of them in OUTPUT/skipped.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_jam.config.log import logger
from megatron_jam.data.blend import Blend
from megatron_jam.parallel.world import World

SKIPPED = "skipped.jsonl"
_SHOWN = 8


def report_skipped(
    path: Path,
    step: int,
    reason: str,
    batch: Sequence[Sequence[int]],
    suspects: Sequence[int],
    *,
    blend: Blend,
    names: Sequence[str],
    world: World,
) -> None:
    """Say which samples a step that was skipped had; all ranks take part.

    Args:
        path: the file to append to.
        step: counted from 1.
        reason: why it was skipped.
        batch: indices of this replica's samples by micro-batch.
        suspects: numbers of this rank's micro-batches whose loss is not finite; if no rank has
            any, all samples are named.
        blend: what the samples are of.
        names: the blend's sets.
        world: the ranks.
    """
    mine = [index for number in suspects for index in batch[number]]
    everything = [index for each in batch for index in each]
    gathered: list[tuple[list[int], list[int]]] = [([], []) for _ in range(world.size)]
    dist.all_gather_object(gathered, (mine, everything))
    if world.rank != 0:
        return
    found = {index for suspect, _ in gathered for index in suspect}
    chosen = sorted(found or {index for _, every in gathered for index in every})
    places = [(names[number], sample) for number, sample in map(blend.locate, chosen)]
    shown = ", ".join(f"{name} {sample}" for name, sample in places[:_SHOWN])
    more = f" and {len(places) - _SHOWN} more, see {path}" if places[_SHOWN:] else ""
    logger.warning("step %d skipped: %s | samples: %s%s", step, reason, shown, more)
    entry = {"step": step, "reason": reason, "samples": places}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
