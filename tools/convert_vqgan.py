"""Convert a checkpoint of taming-transformers to an image tokenizer."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_settings
from megatron_jam.config.log import logger
from megatron_jam.tokenizers.image import check_output
from megatron_jam.tokenizers.taming import TamingConfig, TamingTokenizer
from megatron_jam.weights.lazy import Lazy
from megatron_jam.weights.metaseq.pickles import TorchFile


def main(checkpoint: Path, output: Path, *, settings: Path | None = None) -> None:
    """Write OUTPUT, an image tokenizer for tools/prepare_images.py and tools/generate.py.

    Args:
        checkpoint: last.ckpt of a VQModel or a GumbelVQ, or its weights as .safetensors. Nothing
            that the file names is run.
        output: folder to write.
        settings: its model.yaml; by default the settings of vqgan_gumbel_f8.
    """
    check_output(output)
    config = TamingConfig.from_taming(read_settings(settings)) if settings else TamingConfig()
    tokenizer = TamingTokenizer(config)
    tokenizer.take(read_weights(checkpoint), str(checkpoint))
    tokenizer.save(output)
    logger.info(
        *("%s: %d codes of %d a picture of %d pixels", output, tokenizer.tokens_per_image),
        *(tokenizer.num_codes, tokenizer.image_size),
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by taming's names, but those of the losses it was trained with.

    Raises:
        UsageError: it is no such file.
    """
    if path.suffix == ".safetensors":
        try:
            found: dict[str, Any] = load_file(path)
        except SafetensorError as error:
            raise UsageError(f"{path} is no whole .safetensors file: {error}") from error
    else:
        values = TorchFile(path).values
        values = values.get("state_dict", values) if isinstance(values, dict) else {}
        found = {n: each.read() for n, each in values.items() if isinstance(each, Lazy)}
    return {name: each for name, each in found.items() if not name.startswith("loss.")}


if __name__ == "__main__":
    run_command(main)
