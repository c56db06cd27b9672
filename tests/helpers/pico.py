"""Models small enough for tests, with weights that are large enough to matter."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_jam.config.model import BridgeConfig, ModelConfig, TowerConfig
from megatron_jam.models.parameters import parameter_table
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import TOKENIZER, VOCABULARY, FolderWriter, WeightsFolder

LLAMA: dict[str, object] = {
    "norm": "rms",
    "affine_norm": True,
    "positions": "rope",
    "activation": "silu",
    "gated": True,
    "ffn_size": 80,
    "num_heads": 8,
    "num_kv_heads": 4,
}
"""Settings of a Llama-style tower."""

SEPARATE = {"tables": "per_tower", "head": "wide"}
"""Settings of a JAM-Cross that with zero bridges is both parents."""

TEXTS = ["the quick brown fox jumps over the lazy dog", "a strawberry is a sweet red fruit"]


def pico_vocabulary() -> JointVocabulary:
    """A vocabulary of 300 text ids, 16 image codes and 4 sentinels."""
    return JointVocabulary.build(text_size=300, num_image_codes=16, num_sentinels=4)


def pico_tokenizer() -> TextTokenizer:
    """The text tokenizer of every pico folder."""
    return TextTokenizer.train(TEXTS, vocab_size=300)


def pico_config(kind: str = "cross", *, num_layers: int = 4, **tower: object) -> ModelConfig:
    """A tower ("tower") or a JAM-Cross of width 32, with tables and head as the authors' ("cross")
    or of each tower's own ("separate")."""
    settings = {"num_layers": num_layers, "hidden_size": 32, "num_heads": 4, **tower}
    names = ("main",) if kind == "tower" else ("image", "text")
    joint = {} if kind == "tower" else {"text_ids": list(pico_vocabulary().text)}
    return ModelConfig(
        towers={name: TowerConfig(**settings) for name in names},  # type: ignore[arg-type]
        vocab_size=pico_vocabulary().size,
        max_positions=64,
        bridges=BridgeConfig(every=2),
        **joint | (SEPARATE if kind == "separate" else {}),  # type: ignore[arg-type]
    )


def pico_tensors(
    config: ModelConfig, *, seed: int = 0, scale: float = 0.2
) -> dict[str, torch.Tensor]:
    """Random float64 tensors in which no branch is zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in parameter_table(config):
        value = torch.randn(entry.shape, generator=generator, dtype=torch.float64) * scale
        tensors[entry.name] = value + 1 if entry.start == "one" else value
    return tensors


def pico_source(root: Path) -> Path:
    """A folder in `root` with the tokenizer and vocabulary of every pico folder."""
    source = root / "pico_tokenizer"
    if not source.exists():
        source.mkdir(parents=True)
        pico_tokenizer().save(source / TOKENIZER)
        pico_vocabulary().save(source / VOCABULARY)
    return source


def pico_folder(
    path: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float = 0.2,
) -> Path:
    """A weights folder of `config` with `pico_tensors`."""
    source = pico_source(path.parent)
    tensors = pico_tensors(config, seed=seed, scale=scale)
    shapes = {entry.name: entry.shape for entry in parameter_table(config)}
    with FolderWriter(path, config=config, source=source, shapes=shapes, dtype=dtype) as writer:
        for name in shapes:
            writer.write(name, tensors[name])
        writer.finish({"source": "pico"})
    return path


def changed_folder(output: Path, like: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A weights folder with the tensors of another, each changed."""
    folder = WeightsFolder(like)
    shapes = {name: folder.shape(name) for name in folder.names}
    with FolderWriter(
        output, config=folder.config, source=like, shapes=shapes, dtype=folder.dtype
    ) as writer:
        for name in shapes:
            writer.write(name, change(name, folder.read(name).clone()))
        writer.finish({"made_by": "a test"})
    return output
