"""Write a fresh model as a weights folder."""

from pathlib import Path

import torch

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_not_read, read_settings
from megatron_jam.config.log import logger
from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import num_parameters, parameter_table
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import VOCABULARY, FolderWriter
from megatron_jam.weights.initial import initial_tensor


def main(config: Path, tokenizer: Path, output: Path, *, seed: int = 0) -> None:
    """Draw the weights of a model, each tensor from (seed, name), independent of any layout.

    Args:
        config: YAML of the model; vocab_size may be left out.
        tokenizer: folder with tokenizer.json and vocabulary.json.
        output: weights folder to write.
        seed: of the weights.
    """
    check_not_read(output, tokenizer)
    values = read_settings(config)
    vocabulary = JointVocabulary.load(tokenizer / VOCABULARY)
    values.setdefault("vocab_size", vocabulary.size)
    if len(values.get("towers") or ()) > 1:
        values.setdefault("text_ids", list(vocabulary.text))
    model = ModelConfig.from_dict(values)
    if model.vocab_size != vocabulary.size:
        raise UsageError(
            f"{config}: vocab_size {model.vocab_size} is not the {vocabulary.size} of {tokenizer};"
            " leave it out"
        )
    if len(model.readers) > 1 and model.text_ids != list(vocabulary.text):
        raise UsageError(
            f"{config}: text_ids {model.text_ids} are not the {list(vocabulary.text)} of"
            f" {tokenizer}; leave them out"
        )
    table = parameter_table(model)
    shapes = {entry.name: entry.shape for entry in table}
    with FolderWriter(
        output, config=model, source=tokenizer, shapes=shapes, dtype=torch.float32
    ) as writer:
        for entry in table:
            writer.write(entry.name, initial_tensor(entry, model, seed=seed, pad=vocabulary.pad))
        writer.finish({"made_by": "tools/init.py", "seed": seed})
    logger.info("wrote %s: %s parameters", output, f"{num_parameters(model):,}")


if __name__ == "__main__":
    run_command(main)
