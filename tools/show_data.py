"""Show samples of a run as the model gets them, on a page of HTML."""

from pathlib import Path

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.log import logger
from megatron_jam.config.run import load_run_config
from megatron_jam.data.loader import build_dataset, image_tokenizer_of
from megatron_jam.data.prepare.text import load_text_folder
from megatron_jam.data.showing import Shower, write_page
from megatron_jam.tokenizers.image_folder import load_image_tokenizer


def main(
    run: Path,
    text_tokenizer: str,
    output: Path,
    *,
    image_tokenizer: str | None = None,
    first: int = 0,
    count: int = 8,
) -> None:
    """Write OUTPUT: token, label, whether it counts, modality, document, position; pictures.

    Args:
        run: the run's YAML file: its sets, objective, packing and seed make the samples.
        text_tokenizer: folder with tokenizer.json and vocabulary.json.
        output: .html file to write.
        image_tokenizer: folder of the image tokenizer, to decode pictures.
        first: global index of the first sample: a run with global_batch_size 8 reads 8 to 15 in its
            second step.
        count: samples that are shown.
    """
    if first < 0 or count < 1:
        raise UsageError(f"first {first} must be at least 0, count {count} at least 1")
    config = load_run_config(["--config", str(run)])
    tokenizer, vocabulary = load_text_folder(text_tokenizer)
    images = load_image_tokenizer(image_tokenizer) if image_tokenizer else None
    made_with = image_tokenizer_of(config.data)
    if images and made_with not in ("", images.sha256):
        raise UsageError(
            f"the sets' pictures were made with another tokenizer than {image_tokenizer}"
        )
    dataset = build_dataset(
        config.data, vocabulary, context_length=config.context_length, seed=config.seed
    )
    shower = Shower(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        images=images,
        isolate_documents=config.data.isolate_documents,
    )
    names = [each.name for each in config.data.sets]
    samples = []
    for index in range(first, first + count):
        sample = dataset.sample(index)
        title = f"Sample {index}: {names[sample.dataset]}"
        samples.append(shower.show(sample, title=title))
    title = f"Samples {first} to {first + count - 1} of {run}"
    write_page(output, title=title, settings=run.read_text(encoding="utf-8"), samples=samples)
    logger.info("open %s", output)


if __name__ == "__main__":
    run_command(main)
