"""From questions and captions to documents with text and pictures, and their files."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import publish, temporary_name, write_text_atomically
from megatron_jam.config.generation import SamplingConfig
from megatron_jam.config.log import logger
from megatron_jam.generation.decoder import Decoder
from megatron_jam.generation.page import Card, Section, render_page
from megatron_jam.generation.stages import Stages
from megatron_jam.models.jam import JamModel
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.document import image_prompt, question_prompt, split_document
from megatron_jam.tokenizers.image import ImageTokenizer, image_from_pixels
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import load_weights

Kind = Literal["question", "caption"]


@dataclass(frozen=True, kw_only=True)
class Document:
    """What a model wrote for one prompt."""

    kind: Kind
    """What the prompt was."""

    prompt: str
    """The question or the caption."""

    index: int
    """Number of the prompt, on which its draws depend."""

    parts: tuple[str | Image.Image, ...]
    """Texts and RGB pictures in order; a question's answer, or a caption's one picture."""

    num_tokens: int
    """Tokens written."""


class Illustrator:
    """Answers questions and draws captions with a weights folder and an image tokenizer."""

    def __init__(
        self,
        weights: WeightsFolder,
        image_tokenizer: ImageTokenizer,
        world: World,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the weights on these ranks.

        Raises:
            UsageError: the weights, the image tokenizer and the layout do not go together.
        """
        check_image_tokenizer(
            image_tokenizer,
            weights,
            trained=weights.image_tokenizer_sha256,
            pictures=f"the pictures that {weights.path} was trained on",
        )
        self._vocabulary = weights.vocabulary
        self._text = TextTokenizer.load(weights.tokenizer_path)
        self._images = image_tokenizer.to(world.device)
        self._device = world.device
        chunks = [
            JamModel(weights.config, world, dtype=dtype, chunk=i)
            for i in range(world.parallel.interleave)
        ]
        self._decoder = Decoder(
            Stages(chunks, world),
            world,
            self._vocabulary,
            tokens_per_image=image_tokenizer.tokens_per_image,
        )
        load_weights(chunks, weights, world)

    def write(
        self,
        prompts: Sequence[str],
        settings: SamplingConfig,
        *,
        kind: Kind = "question",
        batch_size: int = 16,
        first_index: int = 0,
    ) -> list[Document]:
        """A document for each prompt; the same whatever `batch_size` is, up to rounding.

        Args:
            prompts: questions, which are answered, or captions, for each of which one picture is
                drawn.
            settings: how to draw.
            kind: what `prompts` are.
            batch_size: documents written at once.
            first_index: number of the first prompt.

        Raises:
            UsageError: a prompt is empty or too long.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        if kind == "caption":  # the picture alone: one that has begun is always finished
            settings = dataclasses.replace(settings, max_new_tokens=1)
        for number, prompt in enumerate(prompts, start=first_index):
            if not prompt.strip():
                raise UsageError(f"prompt {number} is empty")
        documents: list[Document] = []
        lay_out = question_prompt if kind == "question" else image_prompt
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            # Texts are right-stripped before BPE in training too.
            tokens = [lay_out(self._vocabulary, self._text.encode(p.rstrip())) for p in batch]
            first = first_index + begin
            written = self._decoder.generate(tokens, settings, first_index=first)
            for i, (prompt, new) in enumerate(zip(batch, written, strict=True)):
                parts = tuple(self._show(part) for part in split_document(self._vocabulary, new))
                documents.append(
                    Document(
                        kind=kind,
                        prompt=prompt,
                        index=first + i,
                        parts=parts,
                        num_tokens=len(new),
                    )
                )
            logger.info("generation: %d of %d %ss", len(documents), len(prompts), kind)
        return documents

    def _show(self, part: tuple) -> str | Image.Image:
        kind, content = part
        if kind == "text":
            return self._text.decode(content.tolist()).strip()
        codes = torch.from_numpy(content)[None].to(self._device)
        return image_from_pixels(self._images.decode(codes)[0])


def check_image_tokenizer(
    images: ImageTokenizer,
    weights: WeightsFolder,
    *,
    trained: str,
    pictures: str,
    name: str = "the image tokenizer",
) -> None:
    """Raise UsageError unless `images` can draw what a model of `weights` writes.

    Args:
        images: called `name` in errors.
        weights: whose vocabulary has the codes.
        trained: sha256 of the image tokenizer of the training's pictures; empty if not known.
        pictures: what those are called.
    """
    codes = weights.vocabulary.image.size
    if images.num_codes != codes:
        raise UsageError(
            f"{name} has {images.num_codes} codes, the vocabulary of {weights.path}"
            f" {codes}; give the one it was trained with"
        )
    if trained and trained != images.sha256:
        raise UsageError(
            f"{name} ({images.sha256[:12]}) is not the image tokenizer ({trained[:12]}) of"
            f" {pictures}; give that one"
        )


def prompt_cards(documents: Sequence[Document]) -> list[Card]:
    """The documents for :func:`render_page`."""
    return [Card(title=each.prompt, parts=each.parts) for each in documents]


def write_documents(
    output: Path | str, documents: Sequence[Document], settings: SamplingConfig, *, title: str
) -> None:
    """Write index.html, documents.json and the pictures NNN-k.png into the folder `output`."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    records = []
    for document in documents:
        parts = []
        for part in document.parts:
            if isinstance(part, str):
                parts.append({"text": part})
                continue
            number = sum("image" in each for each in parts)
            name = f"{document.index:03d}-{number}.png"
            _save_png(part, output / name)
            parts.append({"image": name})
        records.append(
            {
                "kind": document.kind,
                "prompt": document.prompt,
                "index": document.index,
                "seed": settings.seed,
                "num_tokens": document.num_tokens,
                "parts": parts,
            }
        )
    content = {"settings": dataclasses.asdict(settings), "documents": records}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text_atomically(output / "documents.json", text)
    note = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(settings).items())
    section = Section(text=note, cards=prompt_cards(documents))
    render_page(output / "index.html", title=title, sections=[section])


def _save_png(picture: Image.Image, path: Path) -> None:
    temporary = temporary_name(path)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    temporary.write_bytes(buffer.getvalue())
    publish(temporary, path)
