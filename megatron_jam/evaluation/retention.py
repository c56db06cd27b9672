"""What a fusion keeps of its parents: perplexities of text and pictures, side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.files import write_json
from megatron_jam.config.log import logger
from megatron_jam.data.indexed import read_info
from megatron_jam.evaluation.perplexity import measure_folder
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.weights.folder import WeightsFolder

RETENTION = "retention.json"
_KINDS = ("text", "image")


def measure_retention(
    folders: Mapping[str, Path],
    sets: Sequence[DataSetConfig],
    world: World,
    *,
    context_length: int = 0,
    micro_batch_size: int = 1,
) -> list[dict[str, str | float | None]]:
    """Perplexities of weights folders on prepared sets, logged as a table.

    Args:
        folders: each by what it is called.
        sets: prepared sets.
        world: the ranks.
        context_length: tokens read at once; 0 means the fewest positions that a folder has.
        micro_batch_size: contexts computed at once.

    Returns:
        A row for each set and folder: set, model, text, image. None where a set has no such token,
        and where it was made for other ids than the folder's.

    Raises:
        UsageError: a set is missing or too small.
    """
    opened = {name: WeightsFolder(path) for name, path in folders.items()}
    length = context_length or min(each.config.max_positions for each in opened.values())
    rows: list[dict[str, str | float | None]] = []
    for each in sets:
        for name, folder in opened.items():
            found: Mapping[str, float] = {}
            if _knows(folder, each):
                measured = measure_folder(
                    folder.path,
                    [each],
                    world,
                    context_length=length,
                    micro_batch_size=micro_batch_size,
                )
                found = {k: math.exp(v) for k, v in measured[each.name].by_modality().items()}
            row = {"set": each.name, "model": name, **{kind: found.get(kind) for kind in _KINDS}}
            rows.append(row)
            told = [f"{k} {row[k]:.2f}" if row[k] is not None else f"{k} -" for k in _KINDS]
            logger.info("%-12s | %-12s | %s", each.name, name, " | ".join(told))
    return rows


def save_retention(rows: Sequence[Mapping[str, str | float | None]], folder: Path) -> None:
    """Write the table as JSON into a weights folder."""
    write_json(folder / RETENTION, list(rows))


def _knows(folder: WeightsFolder, data: DataSetConfig) -> bool:
    """Whether a set's ids are the folder's."""
    info = read_info(data.path)
    own = TextTokenizer.load(folder.tokenizer_path).sha256
    return (info.vocabulary_sha256, info.tokenizer_sha256) == (folder.vocabulary.sha256, own)
