"""Position tables of parents with unlike numbers of positions."""

import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, TEXT, ModelConfig

METHODS = "image, llm, extend(zeros), extend(repeat) or extend(interpolate)"


def child_positions(text: ModelConfig, image: ModelConfig, recipe: FusionRecipe) -> int:
    """How many positions the child has.

    Raises:
        UsageError: the parents differ, and the recipe does not say what to do.
    """
    counts = {"llm": text.max_positions, "image": image.max_positions}
    if recipe.positions == "equal" and counts["llm"] != counts["image"]:
        raise UsageError(
            f"the LLM has {counts['llm']:,} positions, the image model {counts['image']:,}: say"
            f" `positions: ` {METHODS}"
        )
    return counts.get(recipe.positions, max(counts.values()))


def named_parent(recipe: FusionRecipe) -> str | None:
    """The tower whose position rows the recipe names, if it names one's."""
    return {"image": IMAGE, "llm": TEXT}.get(recipe.positions)


def fitted_positions(table: Tensor, parent: ModelConfig, child: ModelConfig, how: str) -> Tensor:
    """A parent's table [offset + n, d] with the child's offset and number of positions.

    Rows in front that the parent lacks are zeros. A longer table is cut. `extend(zeros)` and
    `extend(repeat)` keep the rows and add zeros, or the rows once more; `extend(interpolate)`
    spreads the rows evenly and draws lines between them.

    Raises:
        UsageError: the table is too short, and `how` does not extend it.
    """
    front, rows = table[: parent.position_offset], table[parent.position_offset :]
    missing = child.max_positions - len(rows)
    if missing < 0:
        rows = rows[: child.max_positions]
    elif missing > 0:
        rows = _extended(rows, child.max_positions, how)
    if child.position_offset > len(front):
        fill = table.new_zeros(child.position_offset - len(front), table.shape[1])
        front = torch.cat([fill, front])
    return torch.cat([front[len(front) - child.position_offset :], rows])


def _extended(rows: Tensor, count: int, how: str) -> Tensor:
    match how:
        case "extend(zeros)":
            return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
        case "extend(repeat)":
            return rows[torch.arange(count) % len(rows)]
        case "extend(interpolate)":
            places = torch.arange(count, dtype=torch.float64) * (len(rows) - 1) / (count - 1)
            low = places.long().clamp(max=max(len(rows) - 2, 0))
            high = (low + 1).clamp(max=len(rows) - 1)
            part = (places - low)[:, None]
            return (rows[low].double() * (1 - part) + rows[high].double() * part).to(rows.dtype)
    raise UsageError(
        f"a parent has {len(rows):,} positions, the child {count:,}, and both parents' rows are"
        " kept: say `positions: ` extend(zeros), extend(repeat) or extend(interpolate)"
    )
