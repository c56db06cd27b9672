"""A checkpoint folder of Hugging Face, read and planned."""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import Unchanged, read_json
from megatron_jam.config.log import logger
from megatron_jam.models.parameters import parameter_table
from megatron_jam.weights.conversion import Conversion, Step, fitted
from megatron_jam.weights.folder import PROVENANCE
from megatron_jam.weights.huggingface import hugging_face_name, model_config
from megatron_jam.weights.ids import read_ids
from megatron_jam.weights.lazy import Lazy
from megatron_jam.weights.stream import INDEX
from megatron_jam.weights.tensor_file import read_index

SINGLE = "model.safetensors"
VQ_MODEL = "model.vqmodel"
"""Room of Chameleon's image tokenizer."""
MOST_PADDING = 127
"""Rows beyond the tokenizer's ids that a token table may have: tables are padded to multiples of
up to 128."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DROPPED = {
    rf"{VQ_MODEL}\..*": "the image tokenizer",
    r".*rotary_emb\.inv_freq": "computed here",
    r".*\.masked_bias|.*\.attn\.bias": "a mask",
}


def read_hugging_face(source: Path, tokenizer: Path) -> Conversion:
    """Read all but the tensors of an OPT, a Llama, a Chameleon or an export of this project, and
    plan its conversion.

    Args:
        source: folder with config.json and safetensors files.
        tokenizer: folder with the checkpoint's tokenizer.json and vocabulary.json; the latter may
            be missing where tokens are named as Chameleon's.

    Raises:
        UsageError: the folder is not whole, or is no model that towers here can compute.
    """
    ids = read_ids(tokenizer)
    path = source / "config.json"
    settings = read_json(path)
    files = tensor_files(source)
    unchanged = Unchanged(files)
    found = read_tensors(files)
    kind = settings.get("model_type", "")
    rows = settings.get("vocab_size", 0)
    config = model_config({**settings, "vocab_size": ids.vocabulary.size}, path)
    if config.vocab_size != ids.vocabulary.size:  # an own model's, which says it itself
        raise UsageError(
            f"{path} says {config.vocab_size:,} ids, but the tokenizer has"
            f" {ids.vocabulary.size:,}: name the tokenizer of this model"
        )
    steps: list[Step] = []
    tensors: dict[str, Lazy] = {}
    for entry in parameter_table(config):
        key = hugging_face_name(entry.name, kind)
        if key not in found:
            raise UsageError(f"{source} has no tensor {key}, which gives {entry.name}")
        whole = found.pop(key)
        if whole.shape != entry.shape and not entry.is_vocabulary:
            whole = _flat(whole, entry.shape)  # norms of heads lie there head by head
        tensors[entry.name], action = fitted(
            key, whole, entry, ids, most_padding=MOST_PADDING, action="copy"
        )
        steps.append(Step(source=key, shape=whole.shape, action=action, target=entry.name))
        if entry.is_vocabulary and whole.shape[0] != rows:
            raise UsageError(f"{source}: config.json says vocab_size {rows}, {key} has another")
    for key, tensor in found.items():
        reasons = [why for form, why in _DROPPED.items() if re.fullmatch(form, key)]
        reasons += ["tied: the token table"] if key == "lm_head.weight" and config.tied else []
        if not reasons:
            raise UsageError(f"{source} has {key}, which no known model has")
        steps.append(Step(source=key, shape=tensor.shape, action=f"drop: {reasons[0]}"))
    if beyond := rows - ids.vocabulary.size:
        logger.info(
            "%s: its last %d of %s token rows are beyond the tokenizer's %s ids and are left out",
            source,
            beyond,
            f"{rows:,}",
            f"{ids.vocabulary.size:,}",
        )
    origin = _origin(source, kind)
    return Conversion(
        config=config, ids=ids, tensors=tensors, steps=steps, origin=origin, unchanged=unchanged
    )


def _origin(source: Path, kind: str) -> dict[str, str]:
    """For provenance.json; of this project's export also which image codes it has seen."""
    origin = {"made_by": "tools/convert_hf.py", "folder": str(source), "model_type": kind}
    name = "image_tokenizer_sha256"
    exported = read_json(source / PROVENANCE) if (source / PROVENANCE).is_file() else {}
    seen = exported.get(name)
    return {**origin, name: seen} if isinstance(seen, str) else origin


def tensor_files(source: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        UsageError: there are none, one is missing, or the index is damaged.
    """
    if (source / INDEX).is_file():
        names = sorted(set(read_index(source / INDEX).values()))
    elif (source / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise UsageError(
            f"{source} has neither {SINGLE} nor {INDEX}: save the model with"
            " save_pretrained(..., safe_serialization=True)"
        )
    for name in names:
        if not (source / name).is_file():
            raise UsageError(f"{source / name} is missing: copy the whole folder")
    return [source / name for name in names]


def read_tensors(files: Iterable[Path]) -> dict[str, Lazy]:
    """All tensors of safetensors files by key.

    Raises:
        UsageError: a file is damaged, or holds what are no weights.
    """
    found: dict[str, Lazy] = {}
    for path in files:
        try:
            # "pt" is the package's own name for torch.
            file = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged ({error}): copy it again") from error
        for key in file.keys():  # noqa: SIM118 - no mapping
            view = file.get_slice(key)
            if view.get_dtype() not in _DTYPES:
                raise UsageError(f"{path}: {key} is {view.get_dtype()}, quantised or no weight")
            found[key] = Lazy(
                shape=tuple(view.get_shape()),
                dtype=_DTYPES[view.get_dtype()],
                read=partial(file.get_tensor, key),
            )
    return found


def _flat(tensor: Lazy, shape: tuple[int, ...]) -> Lazy:
    if torch.Size(tensor.shape).numel() != torch.Size(shape).numel() or len(shape) != 1:
        return tensor
    return Lazy(shape=shape, dtype=tensor.dtype, read=lambda: tensor.read().reshape(shape))
