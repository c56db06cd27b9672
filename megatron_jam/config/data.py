"""What a run trains on."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_jam.config.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RetrievedConfig:
    """How many of the retrieved pairs that a set holds stand in front of a pair. Which ones, and in
    which order, is drawn anew for each pair in each epoch."""

    most: int
    """K: most pairs in front."""

    number: Literal["fixed", "drawn"] = "fixed"
    """fixed: K, or all if there are fewer. drawn: any number from 0 to that, all alike."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if self.most < 0:
            raise UsageError(f"retrieved.most must be at least 0, not {self.most}")


@dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """One prepared set of a blend."""

    name: str
    """Name in logs. The order of the set's documents and its CM3 spans depend on (seed, name),
    so that they stay when other sets join the blend."""

    path: str
    """PREFIX of PREFIX.bin, PREFIX.idx and PREFIX.json, which tools/prepare_*.py write."""

    weight: float = 1.0
    """Share of the samples, relative to the other sets' weights."""

    retrieved: RetrievedConfig | None = None
    """Of a set of pairs that was prepared with retrieved ones. None: all of them stand in front, in
    the order in which they were prepared."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if not self.name or not self.path:
            raise UsageError("data.sets: each set needs a name and a path")
        if not 0 < self.weight < math.inf:
            raise UsageError(
                f"data.sets: weight of {self.name!r} must be a positive number, not {self.weight}"
            )


@dataclass(frozen=True, kw_only=True)
class Cm3Config:
    """The CM3 objective (arXiv 2201.07520; JAM's code applies it to packed blocks)."""

    mean_spans: float = 1.0
    """Mean of the Poisson number of masked spans in a block (with scope: document, in a document);
    0 spans leave it as it is."""

    scope: Literal["block", "authors", "document"] = "block"
    """Where the spans are drawn. block: anywhere in a block, but none beyond `<break>` or a
    document's end; they move to the block's end. authors: as in the authors' code, where a span may
    hold documents' ends. document: in each document for itself, to whose end they move."""

    max_spans: int = 16
    """Most spans in a block or document (the vocabulary's sentinels are a second limit)."""

    mask_whole_caption: float = 0.0
    """Chance that a block's only span is one whole caption, in place of the spans above. The paper
    has 0; then so few captions are masked that a small run never learns the stream without text
    that classifier-free guidance needs, and 0.1 teaches it."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if not 0 <= self.mean_spans <= 100:
            raise UsageError(f"data.cm3.mean_spans must be within 0..100, not {self.mean_spans}")
        if self.max_spans < 1:
            raise UsageError(f"data.cm3.max_spans must be at least 1, not {self.max_spans}")
        if not 0 <= self.mask_whole_caption <= 1:
            raise UsageError(
                f"data.cm3.mask_whole_caption must be within 0..1, not {self.mask_whole_caption}"
            )


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How samples are made; which samples they are does not depend on it."""

    workers: int = 1
    """Threads that make the next step's samples while a step is computed; 0 makes them between
    the steps."""

    index_cache: Path | None = None
    """Folder for the orders of documents, which all ranks of a node then share in memory, and which
    a restart finds there; for sets of many millions of documents. None: each rank makes its own."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if not 0 <= self.workers <= 64:
            raise UsageError(f"loader.workers must be within 0..64, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A blend of prepared sets, and how its samples are made."""

    sets: list[DataSetConfig]
    """The sets to blend."""

    objective: Literal["causal", "cm3"] = "causal"
    """causal: tokens as they are. cm3: some spans moved to the end of the sample. (For instruction
    tuning the paper says cm3, the names of the authors' scripts none: the default.)"""

    packing: Literal["stream", "documents"] = "stream"
    """stream: a sample is the next context_length tokens of the shuffled documents in a row.
    documents: as many whole documents as fit, then padding; longer ones are left out."""

    isolate_documents: bool = False
    """Whether a token attends to its own document alone, in towers and bridges, and positions begin
    anew with each document, whose first token is not predicted. Retrieved documents are part of the
    one that they stand before."""

    loss_on: Literal["all", "answers"] = "all"
    """answers: in sets of questions and answers only the answers and the </s> after each count;
    other sets of the blend count in full."""

    cm3: Cm3Config = field(default_factory=Cm3Config)
    """Settings of objective: cm3."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        names = [each.name for each in self.sets]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"data.sets needs one or more sets with names of their own: {names}")
        if self.objective == "cm3" and self.loss_on == "answers":
            raise UsageError(
                "data.objective=cm3 moves parts of answers away, so data.loss_on=answers cannot "
                "find them: set data.objective=causal or data.loss_on=all"
            )
        if self.loss_on == "answers" and self.packing == "stream":
            raise UsageError(
                "data.loss_on=answers needs whole documents: set data.packing=documents"
            )
