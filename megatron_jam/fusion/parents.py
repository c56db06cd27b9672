"""Two parents as their child sees them: in its ids, with its positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig
from megatron_jam.fusion.blocks import Blocks, held, parents_own
from megatron_jam.fusion.positions import fitted_positions
from megatron_jam.fusion.vocabulary import VocabularyPlan, shown
from megatron_jam.models.parameters import OUTPUT, POSITIONS, TOKENS
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.initial import drawn_row


@dataclass(frozen=True, kw_only=True)
class Parents:
    """What a method makes the child's tensors of."""

    folders: dict[str, WeightsFolder]
    """The image model and the LLM, by the tower that they become."""

    plan: VocabularyPlan
    """The child's ids."""

    config: ModelConfig
    """The child."""

    recipe: FusionRecipe
    """How it is made."""

    @property
    def dtype(self) -> torch.dtype:
        """The child's: it holds both parents' numbers."""
        text, image = (folder.dtype for folder in self.folders.values())
        return torch.promote_types(text, image)

    def has(self, tower: str, name: str) -> bool:
        """Whether a parent has a tensor of this name."""
        return name in self.folders[tower].names

    def get(self, tower: str, name: str) -> Blocks:
        """A parent's tensor by its name there; token tables and positions as the child needs them.

        A parent whose head is tied gives its token table as output rows.
        """
        folder = self.folders[tower]
        source = TOKENS if name == OUTPUT and folder.config.tied else name
        if name in (TOKENS, OUTPUT):
            return self._token_rows(tower, name, parents_own(folder, source))
        if name == POSITIONS:
            return self._positions(folder)
        return parents_own(folder, source)

    def _token_rows(self, tower: str, name: str, own: Blocks) -> Blocks:
        if self.plan.is_whole(tower):
            return own
        places = torch.from_numpy(self.plan.rows[tower])
        table, tokens = own.rows(0, own.shape[0]), self.plan.tokens
        width, std = own.shape[1], self.folders[tower].config.init_std

        def rows(start: int, stop: int) -> Tensor:
            chosen = places[start:stop]
            found = table[chosen.clamp(min=0)]
            for i in torch.nonzero(chosen < 0).flatten().tolist():
                token = f"{name}|{shown(tokens[start + i])}"
                found[i] = drawn_row(token, width, std, seed=self.recipe.seed)
            return found

        return Blocks(shape=(len(places), width), rows=rows)

    def _positions(self, folder: WeightsFolder) -> Blocks:
        own, config = parents_own(folder, POSITIONS), folder.config
        same = ("max_positions", "position_offset")
        if all(getattr(config, each) == getattr(self.config, each) for each in same):
            return own
        table, how = folder.read(POSITIONS), self.recipe.positions
        return held(fitted_positions(table, config, self.config, how))
