"""Let a model answer questions with text and pictures, or draw captions."""

from pathlib import Path
from typing import Literal

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.generation import SamplingConfig
from megatron_jam.config.log import logger
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.generation.documents import Illustrator, write_documents
from megatron_jam.parallel.device import DTYPES
from megatron_jam.parallel.world import start_world, stop_world
from megatron_jam.tokenizers.image_folder import load_image_tokenizer
from megatron_jam.weights.folder import WeightsFolder


def main(
    weights: str,
    image_tokenizer: str,
    output: str,
    *,
    questions: list[str] | None = None,
    questions_file: str | None = None,
    captions: list[str] | None = None,
    captions_file: str | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    batch_size: int = 16,
    precision: Literal["fp32", "bf16"] = "fp32",
    title: str = "Generated documents",
    parallel: ParallelConfig = ParallelConfig(),
) -> None:
    """Write OUTPUT/index.html, OUTPUT/documents.json and each picture as OUTPUT/NNN-k.png.

    Args:
        weights: weights folder.
        image_tokenizer: folder that tools/train_image_tokenizer.py wrote.
        output: folder to write; older files of the same names are replaced.
        questions: questions to answer with text and pictures, as a list: '["What is a cat?"]'.
        questions_file: text file of more questions, one a line.
        captions: captions to draw one picture each for.
        captions_file: text file of more captions, one a line.
        sampling: how tokens are drawn.
        batch_size: documents written at once.
        precision: of weights and activations.
        title: the page's title.
        parallel: layout, under torchrun: parallel.tensor x parallel.pipeline ranks.
    """
    asked = {
        "question": (questions or []) + _lines(questions_file),
        "caption": (captions or []) + _lines(captions_file),
    }
    if not any(asked.values()):
        raise UsageError("nothing to write: give --questions, --captions or a file of them")
    folder, images = WeightsFolder(Path(weights)), load_image_tokenizer(image_tokenizer)
    world = start_world(parallel)
    try:
        if world.data.size > 1:
            raise UsageError(
                f"{world.size} ranks were started, more than parallel.tensor x parallel.pipeline;"
                f" set parallel.tensor to {world.size}"
            )
        illustrator = Illustrator(folder, images, world, dtype=DTYPES[precision])
        documents = []
        for kind, prompts in asked.items():
            numbered = {"first_index": len(documents), "batch_size": batch_size}
            documents += illustrator.write(prompts, sampling, kind=kind, **numbered)
        if world.rank == 0:
            write_documents(output, documents, sampling, title=title)
            logger.info("wrote %s", Path(output) / "index.html")
    finally:
        stop_world()


def _lines(file: str | None) -> list[str]:
    """The lines of a text file that are not blank; none without a file."""
    if file is None:
        return []
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no text in utf-8 ({error}): convert it") from error
    return [line for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    run_command(main)
