"""What shows that a child is what its recipe says, and how far it is from its parents.

Every element is computed again in float64 by rows, from the parents, the recipe and the saved plan
of the vocabulary; no function that made the child takes part, but for what is drawn from a seed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.errors import UsageError
from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import IMAGE, TEXT
from megatron_jam.fusion.expected import Expected
from megatron_jam.fusion.vocabulary import PLAN_FILE
from megatron_jam.models.parameters import parameter_table
from megatron_jam.weights.certificate import LARGEST_DIFFERENCE, LENGTH, PROMPTS
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from megatron_jam.weights.stream import tensor_sha256

ModelLogits = Callable[[Path, NDArray[np.int64]], NDArray[np.float32] | str]
"""(folder, ids [B, S]) -> logits float32 [B, S, V] by models/, or why there are none."""

_MOST = 0.51
"""Units in the last place: half of one, and what a sum in fp32 adds before it is rounded again."""
_CHUNK = 1 << 20
"""Elements that are compared at once."""


def certify_fusion(
    child: WeightsFolder,
    parents: Mapping[str, WeightsFolder],
    recipe: FusionRecipe,
    model_logits: ModelLogits | None,
) -> dict[str, Any]:
    """Recompute a child and measure its distance to its parents.

    Returns:
        The largest error of an element, in units of the last place of the child's dtype; how far
        models/ and the plain reference are apart; and for each parent, over the ids that it knows,
        the largest difference of two logits, the KL divergence (nats a token) and the share of
        tokens with the same likeliest follower.

    Raises:
        UsageError: a tensor of the child, or one of a parent that the child is made of, has not the
            sha256 that was recorded; an element is not the nearest number of its dtype; what it is
            made of is not finite; or the two logits differ.
    """
    expected = Expected(child, parents, recipe, read_plan(child.path / PLAN_FILE))
    worst, where = 0.0, ""
    sound: set[tuple[str, str]] = set()
    for entry in parameter_table(child.config):
        tensor = child.read(entry.name)
        digest = tensor_sha256(tensor)
        for tower, source in sorted(expected.sources(entry) - sound):
            if _check_sound(parents[tower], source, digest):
                sound.add((tower, source))
        if digest != child.hashes[entry.name]:
            raise UsageError(
                f"{entry.name} of the child has not the sha256 that was recorded: run"
                f" tools/verify.py on {_paths(parents)}, else look at the disk; nothing was written"
            )
        error = _error(tensor, lambda rows, e=entry: expected.rows(e, rows))
        if np.isnan(error):
            raise UsageError(
                f"what {entry.name} of the child is made of is not finite in one of"
                f" {_paths(parents)}: nothing was written"
            )
        if not error <= _MOST:
            raise UsageError(
                f"{entry.name} of the child is {error:.3g} units in the last place from what the"
                " recipe says: nothing was written"
            )
        worst, where = max((worst, where), (error, entry.name))
    report: dict[str, Any] = {"largest_error_in_ulp": worst, "largest_error_in": where}
    for tower in (TEXT, IMAGE):
        report[f"distance_to_{tower}"] = _distance(child, parents[tower], expected.ids[tower])
    prompts = _prompts(np.arange(child.config.vocab_size), child.config.max_positions)
    return {**report, **_both_ways(child, prompts, model_logits)}


def _check_sound(parent: WeightsFolder, name: str, copy: str) -> bool:
    """Compare a parent's tensor with its recorded sha256, unless that is `copy`, the sha256 of the
    child's tensor: what was recorded is then what the child has.

    Returns:
        Whether it was read.

    Raises:
        UsageError: it is another.
    """
    due = parent.hashes[name]
    if due == copy:
        return False
    if tensor_sha256(parent.read(name)) != due:
        raise UsageError(
            f"{parent.path}: {name} is not what was written, by its sha256: make or copy the parent"
            " again; nothing was written"
        )
    return True


def _paths(parents: Mapping[str, WeightsFolder]) -> str:
    return ", ".join(str(folder.path) for folder in parents.values())


def read_plan(path: Path) -> dict[str, list]:
    """The columns of a saved plan of the vocabulary."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    _, tokens, takes, of_text, of_image = map(list, zip(*lines, strict=True))
    return {
        "token": tokens,
        "takes": takes,
        TEXT: [int(row) for row in of_text],
        IMAGE: [int(row) for row in of_image],
    }


def _error(tensor: Tensor, expected: Callable[[NDArray], tuple[NDArray, Any]]) -> float:
    """Largest distance to what is expected, in units of the last place there, where 0 is due of the
    least number; of fp64, fp32's, as the computation itself is in fp64. NaN if not all of what is
    expected is finite."""
    bits = torch.finfo(torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)
    digits = round(-np.log2(bits.eps))
    least = np.log2(bits.smallest_normal)
    step, worst = max(1, _CHUNK // max(1, tensor[:1].numel())), 0.0
    for start in range(0, len(tensor), step):
        found = tensor[start : start + step].double().numpy()
        due, slack = expected(np.arange(start, start + len(found)))
        if not np.isfinite(due).all():
            return np.nan
        exponent = np.where(due == 0, least, np.maximum(np.frexp(due)[1] - 1, least))
        error = np.maximum(np.abs(found - due) - slack, 0) / np.exp2(exponent - digits)
        worst = max(worst, float(np.max(error)) if not np.isnan(error).any() else np.inf)
    return worst


def _prompts(ids: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """int64 [2, 32] or as long as the positions: spread over all of `ids`."""
    length = min(LENGTH, longest)
    places = np.arange(PROMPTS * length, dtype=np.int64) * 7_368_787 % len(ids)
    return ids[places].reshape(PROMPTS, length)


def _logits(folder: WeightsFolder, prompts: NDArray[np.int64]) -> Tensor:
    tokens = torch.from_numpy(prompts)
    return reference_logits(folder.config, lambda name: folder.read(name).float(), tokens)


def _distance(
    child: WeightsFolder, parent: WeightsFolder, rows: NDArray[np.int64]
) -> dict[str, float]:
    """Of the child's logits from a parent's, which has row rows[i] for id i, or none (-1)."""
    known = np.flatnonzero(rows >= 0)
    longest = min(child.config.max_positions, parent.config.max_positions)
    prompts = _prompts(known, longest)
    of_child = _logits(child, prompts)[..., torch.from_numpy(known)]
    of_parent = _logits(parent, rows[prompts])[..., torch.from_numpy(rows[known])]
    due, found = F.log_softmax(of_parent, dim=-1), F.log_softmax(of_child, dim=-1)
    return {
        "largest_difference": float((of_parent - of_child).abs().max()),
        "kl_divergence": float((due.exp() * (due - found)).sum(dim=-1).mean()),
        "same_likeliest": float((due.argmax(-1) == found.argmax(-1)).float().mean()),
    }


def _both_ways(
    child: WeightsFolder, prompts: NDArray[np.int64], model_logits: ModelLogits | None
) -> dict[str, Any]:
    """How far models/ and the reference are apart on the child."""
    if model_logits is None:
        return {"models_and_reference": "not compared"}
    found = model_logits(child.path, prompts)
    if isinstance(found, str):
        return {"models_and_reference": f"not compared: {found}"}
    due = _logits(child, prompts)
    scale = max(1.0, float(due.abs().max()))
    difference = float((torch.from_numpy(found) - due).abs().max()) / scale
    if not difference <= LARGEST_DIFFERENCE:
        raise UsageError(
            f"models/ and the plain reference differ by {difference:.3g} on the child: nothing was"
            " written"
        )
    return {"models_and_reference": difference, "prompts": prompts.tolist()}
