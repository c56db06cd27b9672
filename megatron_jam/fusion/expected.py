"""What each element of a child must be, in float64, said once more and in another way."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, PAIR, TEXT
from megatron_jam.models.parameters import Parameter
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.initial import drawn_row, initial_rows

Rows = NDArray[np.int64]
Values = NDArray[np.float64]

_TOKENS, _OUTPUT = "embedding.tokens.weight", "head.output.weight"
_POSITIONS = "embedding.positions.weight"
_OF_PRODUCTS = 2.0**-23
"""Of numbers of 16 bits, weighted in fp32: the weight's rounding and the product's."""


class Expected:
    """Rows of a child's tensors, from parents, recipe and the plan of the vocabulary."""

    def __init__(
        self,
        child: WeightsFolder,
        parents: Mapping[str, WeightsFolder],
        recipe: FusionRecipe,
        plan: Mapping[str, list],
    ) -> None:
        """`plan` is what `fusion/certificate.read_plan` gives."""
        self._child, self._parents, self._recipe = child, parents, recipe
        self._tokens, self._takes = plan["token"], np.array(plan["takes"])
        self.ids = {tower: np.array(plan[tower], dtype=np.int64) for tower in PAIR}
        """Each parent's row of an id, or -1."""
        self._read: set[tuple[str, str]] = set()

    def sources(self, entry: Parameter) -> set[tuple[str, str]]:
        """What one tensor is made of: towers, and the names of tensors of their parents."""
        self._read.clear()
        self.rows(entry, np.arange(0))
        return set(self._read)

    def rows(self, entry: Parameter, rows: Rows) -> tuple[Values, Values | float]:
        """Rows `rows` of one tensor, and how far a sum may be from it before its last rounding."""
        if self._recipe.method == "width":
            return self._width(entry, rows), 0.0
        if self._recipe.method == "cross":
            return self._cross(entry, rows), 0.0
        terms = self._uniform(entry, rows)
        sizes = np.abs(terms[0]) + np.abs(terms[1])
        return sum(terms), sizes * _OF_PRODUCTS if self._child.dtype.itemsize == 2 else 0.0

    def _uniform(self, entry: Parameter, rows: Rows) -> tuple[Values, Values]:
        share = self._recipe.text_share
        if entry.name == _POSITIONS and self._recipe.positions in ("image", "llm"):
            share = float(self._recipe.positions == "llm")
        shares = np.full(len(rows), share)
        if entry.is_vocabulary:
            shares[self._takes[rows] == TEXT] = 1
            shares[np.isin(self._takes[rows], (IMAGE, "drawn"))] = 0
        if len(entry.shape) > 1:
            shares = shares[:, None]
        of_text, of_image = (self._parent(tower, entry.name, rows) for tower in (TEXT, IMAGE))
        # A weight of 0 takes nothing, not even a NaN.
        text = np.where(shares > 0, of_text, 0) * shares
        return text, np.where(shares < 1, of_image, 0) * (1 - shares)

    def _width(self, entry: Parameter, rows: Rows) -> Values:
        name, half = entry.name, entry.shape[0] // 2
        if entry.is_vocabulary or name == _POSITIONS:
            return np.concatenate([self._parent(t, name, rows) for t in (TEXT, IMAGE)], axis=1)
        own = np.where(rows < half, rows, rows - half)
        text, image = (self._parent(tower, name, own) for tower in (TEXT, IMAGE))
        upper = rows < half
        if len(entry.shape) == 1:
            return np.where(upper, text, image)
        mine = np.where(upper[:, None], text, image)
        if self._recipe.fill == "diagonal":
            left = np.where(upper[:, None], mine, 0)
            return np.concatenate([left, mine - left], axis=1)
        second = mine if self._recipe.fill == "copy" else (text + image) / 2
        return np.concatenate([mine, second], axis=1)

    def _cross(self, entry: Parameter, rows: Rows) -> Values:
        parts = entry.name.split(".")
        if entry.is_new:
            return self._drawn(entry, rows)
        towers = [part for part in parts if part in PAIR]
        if towers:
            replacement = ["main"] if parts[0] == "layers" else []
            place = parts.index(towers[0])
            name = ".".join(parts[:place] + replacement + parts[place + 1 :])
            return self._parent(towers[0], name, rows)
        widths = {t: self._child.config.towers[t].hidden_size for t in PAIR}
        if entry.is_vocabulary:
            values = np.zeros((len(rows), max(widths.values())))
            is_text = self._takes[rows] == TEXT
            for tower, chosen in ((TEXT, is_text), (IMAGE, ~is_text)):
                values[chosen, : widths[tower]] = self._parent(tower, entry.name, rows[chosen])
            return values
        wide = [t for t in PAIR if widths[t] == max(widths.values())]
        if entry.name == _POSITIONS:
            named = {"image": IMAGE, "llm": TEXT}.get(self._recipe.positions, wide[0])
            values = np.zeros((len(rows), max(widths.values())))
            values[:, : widths[named]] = self._parent(named, entry.name, rows)
            return values
        known = [t for t in wide if entry.name in self._parents[t].names]
        return np.mean([self._parent(tower, entry.name, rows) for tower in known], axis=0)

    def _drawn(self, entry: Parameter, rows: Rows) -> Values:
        """What no parent has: from the seed."""
        if not len(rows):
            return np.zeros((0, *entry.shape[1:]))
        low, config = int(rows.min()), self._child.config
        drawn = initial_rows(entry, config, low, int(rows.max()) + 1, seed=self._recipe.seed)
        return drawn.double().numpy()[rows - low]

    def _parent(self, tower: str, name: str, rows: Rows) -> Values:
        """A parent's rows as numbered in the child."""
        folder = self._parents[tower]
        stored = _TOKENS if name == _OUTPUT and folder.config.tied else name
        self._read.add((tower, stored))
        table = folder.read(stored)
        if name in (_TOKENS, _OUTPUT):
            places = self.ids[tower][rows]
            values = _take(table, np.maximum(places, 0))
            for i in np.flatnonzero(places < 0):
                values[i] = self._drawn_token(tower, name, rows[i])
            return values
        return self._placed(tower, table, rows) if name == _POSITIONS else _take(table, rows)

    def _drawn_token(self, tower: str, name: str, number: int) -> Values:
        config = self._parents[tower].config
        token = f"{name}|{self._tokens[number]}"
        row = drawn_row(token, config.hidden_size, config.init_std, seed=self._recipe.seed)
        return row.to(self._parents[tower].dtype).double().numpy()

    def _placed(self, tower: str, table: torch.Tensor, rows: Rows) -> Values:
        """A parent's position rows in the child's numbering, grown as the recipe says."""
        mine, child = self._parents[tower].config, self._child.config
        count, method = len(table) - mine.position_offset, self._recipe.positions
        places = (rows - child.position_offset).astype(np.float64)
        behind = places >= 0
        if child.max_positions > count:
            if method == "extend(interpolate)":
                places[behind] = places[behind] * (count - 1) / (child.max_positions - 1)
            elif method == "extend(repeat)":
                places[behind] %= count
        low = np.floor(places)
        part = (places - low)[:, None]
        exists = (low + mine.position_offset >= 0) & (low < count)
        first = np.where(exists, low + mine.position_offset, 0).astype(np.int64)
        second = np.minimum(first + 1, len(table) - 1)
        values = _take(table, first) * (1 - part) + _take(table, second) * part
        values = np.where(exists[:, None], values, 0)
        if self._recipe.method != "uniform":
            return values
        # What is averaged are rows of the parent's dtype.
        return torch.from_numpy(values).to(self._parents[tower].dtype).double().numpy()


def _take(table: torch.Tensor, rows: Rows) -> Values:
    return table[torch.from_numpy(rows)].double().numpy()
