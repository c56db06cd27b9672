"""Samples as a page of HTML: what the model reads, and what it is asked for."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from megatron_jam.config.files import write_text_atomically
from megatron_jam.data.loader import collate
from megatron_jam.data.sample import Sample
from megatron_jam.tokenizers.image import ImageTokenizer, image_from_pixels
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import (
    IMAGE,
    SPECIAL,
    TEXT,
    TEXT_SPECIALS,
    JointVocabulary,
)

TEMPLATE = "samples.html.jinja"
_NAMES = dict(zip(("bos", "pad", "eos", "unk"), TEXT_SPECIALS, strict=True))
MODALITIES = {TEXT: "text", IMAGE: "image", SPECIAL: "special"}


@dataclass(frozen=True, kw_only=True)
class Token:
    """One place of a sample."""

    place: int
    """In the sample, from 0."""

    token: str
    """What the model reads."""

    label: str
    """What it is to predict there."""

    counted: bool
    """Whether that counts in the loss."""

    modality: str
    """Of the label, by which losses are reported."""

    kind: str
    """Modality of the token."""

    document: int
    """Of the token; documents of a sample are counted from 0."""

    position: int
    """That the model is told."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring tokens of one document and modality."""

    tokens: list[Token]
    picture: str = ""
    """A whole picture, as the address of a PNG."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample on the page."""

    title: str
    """Its number and set."""

    facts: str
    """What is counted of it."""

    runs: list[Run]


class Shower:
    """Makes samples readable."""

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        vocabulary: JointVocabulary,
        images: ImageTokenizer | None,
        isolate_documents: bool,
    ) -> None:
        """Show ids of `vocabulary`; pictures are decoded if there are `images`."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._images = images
        self._isolate = isolate_documents
        self._names = {
            number: _NAMES.get(name, f"<{name.strip('_')}>")
            for name, number in vocabulary.singles.items()
        }

    def show(self, sample: Sample, *, title: str) -> Shown:
        """The sample as training collates it."""
        batch = {
            name: tensor[0].numpy()
            for name, tensor in collate([sample], isolate_documents=self._isolate).items()
        }
        tokens = [
            Token(
                place=place,
                token=self.name(int(batch["tokens"][place])),
                label=self.name(int(batch["labels"][place])),
                counted=bool(batch["loss_mask"][place]),
                modality=MODALITIES[int(self._vocabulary.modality[batch["labels"][place]])],
                kind=MODALITIES[int(self._vocabulary.modality[batch["tokens"][place]])],
                document=int(sample.documents[place]),
                position=int(batch["positions"][place]),
            )
            for place in range(len(batch["tokens"]))
        ]
        documents = {each.document for each in tokens if each.token != _NAMES["pad"]}
        counted = [each.modality for each in tokens if each.counted]
        by_modality = ", ".join(f"{counted.count(m)} {m}" for m in MODALITIES.values())
        facts = (
            f"{len(tokens)} tokens of {len(documents)} documents; "
            f"{len(counted)} labels count: {by_modality}; {sample.dropped} tokens dropped"
        )
        return Shown(title=title, facts=facts, runs=list(self._runs(tokens, batch["tokens"])))

    def name(self, number: int) -> str:
        """An id as people read it; text with its white space visible."""
        vocabulary = self._vocabulary
        if number in self._names:
            return self._names[number]
        if vocabulary.sentinels.start <= number < vocabulary.sentinels.stop:
            return f"<sentinel:{number - vocabulary.sentinels.start}>"
        if vocabulary.modality[number] == IMAGE:
            return f"I{number - vocabulary.image.start}"
        if vocabulary.modality[number] == TEXT:
            text = self._tokenizer.decode([number - vocabulary.text.start])
            return text.replace("\n", "\N{RETURN SYMBOL}").replace(" ", "\N{OPEN BOX}")
        return f"<{number}>"

    def _runs(self, tokens: list[Token], ids: NDArray) -> Iterator[Run]:
        keys = [(each.kind, each.document, each.token == _NAMES["pad"]) for each in tokens]
        borders = [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]]
        for first, last in zip([0, *borders], [*borders, len(tokens)], strict=True):
            run = tokens[first:last]
            size = self._images.tokens_per_image if self._images else 0
            # Behind each other without a <break> there may be several pictures.
            if run[0].kind == "image" and size and len(run) % size == 0:
                for begin in range(0, len(run), size):
                    codes = self._vocabulary.image_code(ids[first + begin : first + begin + size])
                    yield Run(tokens=run[begin : begin + size], picture=self._picture(codes))
            else:
                yield Run(tokens=run)

    def _picture(self, codes: NDArray[np.int64]) -> str:
        assert self._images is not None
        pixels = self._images.decode(torch.from_numpy(codes)[None])[0]
        stream = io.BytesIO()
        image_from_pixels(pixels).save(stream, "PNG")
        return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def write_page(path: Path | str, *, title: str, settings: str, samples: Sequence[Shown]) -> None:
    """Write one HTML file that needs no other."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(TEMPLATE)
    write_text_atomically(path, page.render(title=title, settings=settings, samples=samples))
