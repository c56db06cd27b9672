"""Image tokenizers of every kind, out of their folders."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from megatron_jam.config.errors import UsageError
from megatron_jam.tokenizers.image import CONFIG_FILE, WEIGHTS_FILE, ImageTokenizer, read_config
from megatron_jam.tokenizers.taming import TamingConfig, TamingTokenizer
from megatron_jam.tokenizers.vq import VqConfig, VqTokenizer

_KINDS = {"vq": (VqTokenizer, VqConfig), "taming": (TamingTokenizer, TamingConfig)}


def load_image_tokenizer(folder: Path | str) -> ImageTokenizer:
    """The tokenizer that :meth:`ImageTokenizer.save` wrote, on the CPU, in evaluation mode.

    Raises:
        UsageError: a file is missing, or does not hold an image tokenizer.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is no image tokenizer, it has no {name}: "
                f"make one with tools/train_image_tokenizer.py"
            )
    values = read_config(folder)
    kind = values.pop("kind", "vq")
    if kind not in _KINDS:
        raise UsageError(f"{folder / CONFIG_FILE}: kind {kind!r} is not one of {sorted(_KINDS)}")
    make, make_config = _KINDS[kind]
    try:
        config = make_config(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder / CONFIG_FILE} is no image tokenizer's: {error}") from error
    tokenizer = make(config)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise UsageError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from error
    tokenizer.take(tensors, str(folder / WEIGHTS_FILE))
    return tokenizer.eval()
