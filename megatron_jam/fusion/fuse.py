"""From a recipe and two parents to a child, streamed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.log import logger
from megatron_jam.config.model import IMAGE, MAIN, TEXT, ModelConfig
from megatron_jam.fusion.certificate import ModelLogits, certify_fusion
from megatron_jam.fusion.compatibility import Difference, check_parents
from megatron_jam.fusion.cross import cross_config, cross_tensor
from megatron_jam.fusion.parents import Parents
from megatron_jam.fusion.positions import child_positions
from megatron_jam.fusion.uniform import uniform_config, uniform_tensor
from megatron_jam.fusion.vocabulary import PLAN_FILE, VocabularyPlan
from megatron_jam.fusion.width import width_config, width_tensor
from megatron_jam.models.parameters import num_parameters, parameter_table
from megatron_jam.weights.folder import FolderWriter, WeightsFolder, tokenizer_files
from megatron_jam.weights.stream import Fill
from megatron_jam.weights.tensor_file import Stored

METHODS: dict[str, tuple[Callable, Callable]] = {
    "uniform": (uniform_config, uniform_tensor),
    "width": (width_config, width_tensor),
    "cross": (cross_config, cross_tensor),
}


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A fusion of which everything but the tensors is settled."""

    parents: Parents
    """What it is made of."""

    differences: list[Difference]
    """In what the parents differ."""

    @classmethod
    def plan(cls, recipe: FusionRecipe) -> Self:
        """Settle the child's shape, ids and positions; nothing is written.

        Raises:
            UsageError: the parents do not fit each other or the method; it says what to do.
        """
        text, image = WeightsFolder(recipe.text), WeightsFolder(recipe.image)
        differences = check_parents(text, image, recipe)
        mixes = recipe.method != "cross" or recipe.tables == "per_tower"
        source = recipe.tokenizer or image.path
        vocabulary = VocabularyPlan.make(text, image, source, mixes=mixes)
        configure = METHODS[recipe.method][0]
        # Parents need not know their text ids; two towers with rows of their own must.
        is_pair = recipe.method == "cross"
        of_child = partial(
            dataclasses.replace,
            vocab_size=vocabulary.vocabulary.size,
            text_ids=list(vocabulary.vocabulary.text) if is_pair else [0, 0],
            max_positions=child_positions(text.config, image.config, recipe),
            position_offset=image.config.position_offset,
        )
        config = configure(of_child(text.config), of_child(image.config), recipe)
        folders = {IMAGE: image, TEXT: text}
        parents = Parents(folders=folders, plan=vocabulary, config=config, recipe=recipe)
        for entry in parameter_table(config):
            if entry.layer is None:
                METHODS[recipe.method][1](entry, parents)  # refuses positions that a parent lacks
        return cls(parents=parents, differences=differences)

    def as_lines(self) -> list[str]:
        """The plan, for a reader."""
        config, recipe = self.parents.config, self.parents.recipe
        told = [f"the parents differ in {difference}" for difference in self.differences]
        told += self._dropped_norms()
        told += self.parents.plan.summary()
        told.append(
            f"JAM-{recipe.method.capitalize()}: {num_parameters(config):,} parameters,"
            f" {config.max_positions:,} positions, {config.vocab_size:,} ids"
        )
        return told

    def _dropped_norms(self) -> list[str]:
        """What a cross does not keep of a parent: its last norm, where both towers share a head
        whose norm is of the other's kind or width."""
        parents = self.parents
        if not parents.config.is_pair or parents.config.readers != (MAIN,):
            return []
        kept = {entry.name for entry in parameter_table(parents.config)}
        whose = {TEXT: "LLM", IMAGE: "image model"}
        return [
            f"{name} of the {whose[tower]} is dropped: both towers share a head, whose last norm is"
            f" the {whose[parents.config.other_tower(tower)]}'s; `head: wide` keeps both"
            for tower, folder in parents.folders.items()
            for name in folder.names
            if name.startswith("head.norm.")
            and (name not in kept or tower in parents.config.projected_towers)
        ]

    def write(self, *, model_logits: ModelLogits | None = None) -> dict[str, Any]:
        """Write the child, in a dtype that holds both parents', and return its certificate.

        Args:
            model_logits: computes a folder's logits with models/, for the certificate.

        Raises:
            UsageError: a parent changed meanwhile, or the child is not what the recipe says;
                nothing is written.
        """
        parents, provenance = self.parents, self.provenance()
        with self.writer() as writer:
            self.stream(writer)
            child = writer.complete(provenance)
            certificate = certify_fusion(child, parents.folders, parents.recipe, model_logits)
            writer.finish({**provenance, "certificate": certificate})
        logger.info("wrote %s", parents.recipe.output)
        return certificate

    def writer(self) -> FolderWriter:
        """Of the child's folder."""
        parents, plan = self.parents, self.parents.plan
        return FolderWriter(
            parents.recipe.output,
            config=parents.config,
            source={**tokenizer_files(plan.source), PLAN_FILE: plan.as_tsv().encode()},
            shapes={entry.name: entry.shape for entry in parameter_table(parents.config)},
            dtype=parents.dtype,
        )

    def stream(self, writer: FolderWriter) -> None:
        """Write every tensor: those that are computed together, then parents' own as they lie.

        Raises:
            UsageError: a parent changed meanwhile.
        """
        compute = METHODS[self.parents.recipe.method][1]
        computed: dict[str, Fill] = {}
        copied: dict[str, Stored] = {}
        for entry in parameter_table(self.parents.config):
            blocks = compute(entry, self.parents)
            if blocks.stored is not None and blocks.rows(0, 0).dtype == self.parents.dtype:
                copied[entry.name] = blocks.stored
            else:
                computed[entry.name] = blocks.fill
        writer.write_together(computed)
        for name, stored in copied.items():
            writer.copy(name, stored)
        for folder in self.parents.folders.values():
            folder.unchanged.check()

    def provenance(self) -> dict[str, Any]:
        """Where the child comes from, for provenance.json."""
        parents = self.parents
        settings = {k: v for k, v in dataclasses.asdict(parents.recipe).items() if k != "output"}
        return {
            "made_by": "tools/fuse.py",
            "image_tokenizer_sha256": parents.folders[IMAGE].image_tokenizer_sha256,
            "recipe": {name: str(value) for name, value in settings.items()},
            "differences": [str(each) for each in self.differences],
            "parents": {name: _origin(folder) for name, folder in parents.folders.items()},
        }


def fuse(recipe: FusionRecipe, *, model_logits: ModelLogits | None = None) -> ModelConfig:
    """Plan and write the child of `recipe`; return its description."""
    fusion = Fusion.plan(recipe)
    for line in fusion.as_lines():
        logger.info("%s", line)
    fusion.write(model_logits=model_logits)
    return fusion.parents.config


def _origin(parent: WeightsFolder) -> dict[str, Any]:
    """Where a parent comes from, without what it has written down of its own parents' tensors."""
    dropped = ("sha256", "files_sha256", "dtype", "parents", "certificate")
    kept = {k: v for k, v in parent.provenance.items() if k not in dropped}
    return {"folder": str(parent.path), "sha256": parent.sha256, **kept}
