"""Models, prompts and a slow decoder that several tests of generation share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_jam.config.generation import SamplingConfig
from megatron_jam.generation.row import Row, Rules, legal_table
from megatron_jam.models.jam import JamModel
from megatron_jam.ops.guided_sampling import guided_sample
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.document import Tokens, image_prompt, question_prompt
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import load_weights
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import pico_config, pico_folder, pico_vocabulary

VOCABULARY = pico_vocabulary()
TOKENS_PER_IMAGE = 5
SETTINGS = SamplingConfig(
    guidance_scale=3.0, temperature=1.2, text_temperature=1.5, max_new_tokens=20, seed=11
)


def talkative_folder(path: Path, kind: str, *, num_layers: int = 3, **tower: Any) -> Path:
    """A pico weights folder whose model often writes `<break>`, and sometimes `</s>`."""
    pico_folder(path, pico_config(kind, num_layers=num_layers, **tower))
    (file,) = path.glob("model-*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("tokens.weight"):
            tensor[VOCABULARY.break_] *= 8
            tensor[VOCABULARY.eos] *= 5
    save_file(tensors, file)
    return path


def build_chunks(path: Path, world: World, dtype: torch.dtype = torch.float64) -> list[JamModel]:
    """This rank's model of a weights folder."""
    folder, numbers = WeightsFolder(path), range(world.parallel.interleave)
    chunks = [JamModel(folder.config, world, dtype=dtype, chunk=number) for number in numbers]
    load_weights(chunks, folder, world)
    return chunks


def prompts() -> list[Tokens]:
    """Prompts of unlike lengths: at a document's start, in text, before and within a picture."""
    text = np.arange(10, 30)
    codes = VOCABULARY.image_id(np.arange(TOKENS_PER_IMAGE))
    break_ = [VOCABULARY.break_]
    return [
        np.array([VOCABULARY.eos]),
        question_prompt(VOCABULARY, text[:3]),
        image_prompt(VOCABULARY, text[:9]),
        np.concatenate([image_prompt(VOCABULARY, text[3:5]), codes[:2]]),
        np.concatenate([image_prompt(VOCABULARY, text[7:]), codes, break_, text[:4]]),
        np.concatenate([image_prompt(VOCABULARY, text[9:12]), codes]),
    ]


def reference(path: Path, tokens: list[int]) -> Tensor:
    """Logits [S, V] of the plain-torch forward over whole `tokens`."""
    folder = WeightsFolder(path)
    return reference_logits(folder.config, folder.read, torch.tensor([tokens]))[0]


def slow_decode(
    path: Path, prompt: Tokens, settings: SamplingConfig, index: int, *, guided: bool = True
) -> list[int]:
    """One document by whole plain-torch forwards, one for each token and stream."""
    rules = Rules(
        vocabulary=VOCABULARY,
        tokens_per_image=TOKENS_PER_IMAGE,
        max_positions=WeightsFolder(path).config.max_positions,
        max_new_tokens=settings.max_new_tokens,
    )
    row = Row(rules, prompt, index=index)
    legal = torch.from_numpy(legal_table(VOCABULARY))
    while not row.done:
        cond, uncond = reference(path, row.tokens)[-1:].float(), None
        if row.in_picture and guided:
            uncond = reference(path, [*row.unconditional, row.tokens[-1]])[-1:].float()
        token = guided_sample(
            cond,
            uncond,
            guidance_scale=1.0 if uncond is None else settings.guidance_scale,
            temperature=settings.temperature if row.in_picture else settings.text_temperature,
            top_p=settings.top_p if row.in_picture else settings.text_top_p,
            legal=legal[[row.legal]],
            seed=settings.seed,
            offset=(index << 32) + len(row.tokens),
        ).tokens
        row.push(int(token))
    return row.new_tokens.tolist()
