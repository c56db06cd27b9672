"""Show what the quickstart made: answers with pictures, loss curves, perplexities."""

import io
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from questions import Probe, choose

from megatron_jam.config.cli import run_command
from megatron_jam.config.files import write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.data.prepare.readers import read_records
from megatron_jam.generation.page import Card, Section, Table, render_page

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PHASES = {
    "llm": "LLM parent",
    "image": "Text-to-image parent",
    "alignment": "JAM-Cross, continued pretraining",
    "instruct": "JAM-Cross, instruction tuning",
}
MODELS = {
    "llm/weights": "LLM parent",
    "image/weights": "text-to-image parent",
    "fused/uniform": "JAM-Uniform, before training",
    "fused/width": "JAM-Width, before training",
    "fused/cross": "JAM-Cross, before training",
    "alignment/weights": "JAM-Cross, after continued pretraining",
}
COLORS = {"text": "#1b6ca8", "image": "#c4512d", "special": "#7a8b3f"}


def main(data: Path, output: Path) -> None:
    """Write OUTPUT/index.html and OUTPUT/result.json, and say how many pictures are right.

    Args:
        data: the quickstart's data folder.
        output: the quickstart's output folder.
    """
    cards, hits = answer_cards(data, output / "generation")
    trained = [probe for probe in choose(data) if not probe.held_out]
    score = sum(hits[probe.key] for probe in trained)
    result = f"{score} of {len(trained)}"
    logger.info("pictures of trained concepts whose nearest neighbour is right: %s", result)
    write_text_atomically(
        output / "result.json", json.dumps({"right": score, "asked": len(trained)}) + "\n"
    )
    plot_losses(output, output / "losses.png")
    sections = [
        Section(
            text="An LLM and a text-to-image model, each of four million weights, were trained on"
            " definitions and on captioned pictures, fused into JAM-Cross, trained on both, and"
            " tuned on illustrated answers. Everything below was written by the fused model."
        ),
        Section(
            heading="Trained concepts",
            text=f"The picture's nearest neighbour among all pictures of the data set (L2 on"
            f" pixels) is the right concept for {result}. The questions are every n-th concept in"
            " alphabetical order.",
            cards=[card for probe, card in cards if not probe.held_out],
        ),
        Section(
            heading="Held-out concepts",
            text="No picture, definition or answer of these was in the training data: a model"
            " that knows some hundred things by heart can only guess.",
            cards=[card for probe, card in cards if probe.held_out],
        ),
        Section(
            heading="Perplexity",
            text="Per token, nothing masked, documents read whole: definitions of held-out words,"
            " pictures of trained and of held-out concepts.",
            table=perplexity_table(output / "perplexity.json"),
        ),
        Section(
            heading="Loss",
            text="Nats a token of each training batch, by what is predicted.",
            plots=[output / "losses.png"],
        ),
        Section(
            heading="Image tokenizer",
            text="Originals and their reconstructions from 64 codes.",
            plots=[output / "image_tokenizer" / "reconstructions.png"],
        ),
    ]
    render_page(output / "index.html", title="An illustrated dictionary", sections=sections)
    logger.info("wrote %s", output / "index.html")


def answer_cards(data: Path, folder: Path) -> tuple[list[tuple[Probe, Card]], dict[str, bool]]:
    """A card for each answer, and whether its first picture is nearest to the right concept's."""
    keys, pictures = [], []
    for name in ("pairs.tar", "pairs_heldout.tar"):
        for record in read_records(data / name):
            keys.append(record.key)
            pictures.append(pixels(Image.open(io.BytesIO(record.fields["png"]))))
    originals = np.stack(pictures)
    documents = json.loads((folder / "documents.json").read_text())["documents"]
    cards, hits = [], {}
    for probe, document in zip(choose(data), documents, strict=True):
        assert document["prompt"] == probe.question
        parts: list[str | Image.Image] = []
        nearest = []
        for part in document["parts"]:
            if "text" in part:
                parts.append(part["text"])
                continue
            picture = Image.open(folder / part["image"])
            parts.append(picture)
            distances = np.square(originals - pixels(picture)).sum(axis=1)
            nearest.append(keys[int(distances.argmin())])
        hits[probe.key] = bool(nearest) and nearest[0] == probe.key
        note = f"nearest picture of the data set: {', '.join(nearest) or 'none'}"
        cards.append((probe, Card(title=probe.question, parts=parts, note=note)))
    return cards, hits


def pixels(picture: Image.Image) -> np.ndarray:
    """RGB values as one float row."""
    return np.asarray(picture.convert("RGB"), dtype=np.float64).reshape(-1)


def perplexity_table(path: Path) -> Table:
    """Perplexity of each model by modality, on training and held-out sets."""
    figures = defaultdict(dict)
    for entry in json.loads(path.read_text()):
        model = "/".join(Path(entry["weights"]).parts[-2:])
        figures[model][entry["set"]] = entry["perplexity"]
    columns = [("text_heldout", "text"), ("pairs", "image"), ("pairs_heldout", "image")]
    rows = [
        [title, *(f"{figures[model][name][kind]:,.2f}" for name, kind in columns)]
        for model, title in MODELS.items()
    ]
    heads = ["model", "text, held out", "image codes", "image codes, held out"]
    return Table(columns=heads, rows=rows)


def plot_losses(output: Path, path: Path) -> None:
    """Draw the training losses of the four phases by modality."""
    figure, axes = plt.subplots(1, len(PHASES), figsize=(16, 3.6), sharey=True)
    for axis, (phase, title) in zip(axes, PHASES.items(), strict=True):
        lines = (output / phase / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
        for modality, color in COLORS.items():
            points = [
                (r["step"], r["loss_by_modality"][modality])
                for r in records
                if modality in r["loss_by_modality"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, label=modality, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("nats a token")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main)
