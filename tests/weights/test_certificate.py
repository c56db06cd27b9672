"""The certificate of a conversion: what it measures, and what it refuses."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.errors import UsageError
from megatron_jam.weights import certificate, hf_export
from megatron_jam.weights.certificate import LARGEST_DIFFERENCE, certify, fixed_prompts
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import pico_config, pico_folder, pico_tensors

CONFIG = pico_config("tower", num_layers=2, bias=True, affine_norm=True)
BIAS = "layers.1.main.ffn.fc2.bias"


def tensors(change: float = 0.0) -> dict[str, Tensor]:
    """A model in fp32, one of its biases changed."""
    found = {name: value.float() for name, value in pico_tensors(CONFIG).items()}
    found[BIAS][3] += change
    return found


def test_equal_models_are_told_so() -> None:
    found = certify(CONFIG, tensors().__getitem__, tensors().__getitem__)
    assert found["largest_difference"] == 0
    assert found["kl_divergence"] == 0
    assert found["same_likeliest"] == 1
    assert found["prompts"] == fixed_prompts(CONFIG).tolist()
    ids = {each for prompt in found["prompts"] for each in prompt}
    assert len(ids) == 2 * 32
    assert min(ids) < 20
    assert max(ids) > CONFIG.vocab_size - 20


def rounded(source: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same model with one bias in another dtype."""
    return source | {BIAS: source[BIAS].to(dtype)}


def test_a_small_difference_is_measured() -> None:
    source = tensors(2e-5)
    result, sides = rounded(source, torch.float16), []
    for side in (source, result):
        logits = reference_logits(CONFIG, lambda n, s=side: s[n].float(), fixed_prompts(CONFIG))
        sides.append(logits)
    due = float((sides[0] - sides[1]).abs().max())
    assert 0 < due < LARGEST_DIFFERENCE
    found = certify(CONFIG, source.__getitem__, result.__getitem__)
    assert found["largest_difference"] == pytest.approx(due, rel=1e-3)
    logs = [F.log_softmax(side.double(), dim=-1) for side in sides]
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert found["kl_divergence"] == pytest.approx(divergence, abs=1e-7)


@pytest.mark.parametrize("change", [10.03, math.nan, math.inf])
def test_other_logits_are_refused(change: float) -> None:
    source = tensors(change)
    result = rounded(source, torch.bfloat16)
    with pytest.raises(UsageError, match=r"differ from the source's by .*nothing was written"):
        certify(CONFIG, source.__getitem__, result.__getitem__)


UNTIED = dataclasses.replace(pico_config("tower", num_layers=2, bias=True), tied=False)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("embedding.positions.weight", 34),  # behind the prompts
        ("embedding.tokens.weight", 2),  # an id that no prompt has
        ("head.output.weight", 321),
        ("layers.1.main.attention.q.bias", 0),
    ],
)
@pytest.mark.parametrize("block", [64, 4 << 20])
def test_a_number_that_no_prompt_reaches_is_compared(
    name: str, row: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "_BLOCK_BYTES", block)
    assert 2 not in fixed_prompts(UNTIED)
    source = pico_tensors(UNTIED)
    result = {each: tensor.clone() for each, tensor in source.items()}
    certify(UNTIED, source.__getitem__, result.__getitem__)
    result[name][row] += 1
    with pytest.raises(UsageError, match=f"^{name} of the result differs .* nothing was written"):
        certify(UNTIED, source.__getitem__, result.__getitem__)
    result[name] = source[name][:-1]
    with pytest.raises(UsageError, match=f"^{name} of the result differs"):
        certify(UNTIED, source.__getitem__, result.__getitem__)


@pytest.mark.parametrize("block", [64, 4 << 20])
def test_rows_of_renumbered_ids_are_compared(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "_BLOCK_BYTES", block)
    order = torch.randperm(UNTIED.vocab_size, generator=torch.Generator().manual_seed(0))
    source = pico_tensors(UNTIED)
    tables = ("embedding.tokens.weight", "head.output.weight")
    result = source | {name: source[name][order] for name in tables}
    certify(UNTIED, source.__getitem__, result.__getitem__, order=order)
    result[tables[0]] = result[tables[0]].clone()
    result[tables[0]][2] += 1
    with pytest.raises(UsageError, match=r"embedding\.tokens\.weight of the result differs"):
        certify(UNTIED, source.__getitem__, result.__getitem__, order=order)


def test_numbers_finer_than_fp32_are_compared() -> None:
    source = {name: value.double() for name, value in pico_tensors(CONFIG).items()}
    result = {name: value.clone() for name, value in source.items()}
    result[BIAS][3] += 1e-15

    def in_fp32(name: str) -> Tensor:
        return source[name].float()

    certify(CONFIG, in_fp32, source.__getitem__, stored=source.__getitem__)
    with pytest.raises(UsageError, match=f"{BIAS} of the result differs"):
        certify(CONFIG, in_fp32, result.__getitem__, stored=source.__getitem__)


def test_an_export_that_lost_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = pico_folder(tmp_path / "weights", CONFIG)
    write = hf_export._write_small_files

    def spoil(folder: WeightsFolder, settings: dict[str, Any], part: Path) -> None:
        (path,) = part.glob("*.safetensors")
        written = {key: tensor.clone() for key, tensor in load_file(path).items()}
        written["model.decoder.embed_positions.weight"][34:] = 0
        save_file(written, path)
        write(folder, settings, part)

    monkeypatch.setattr(hf_export, "_write_small_files", spoil)
    with pytest.raises(UsageError, match=r"embedding\.positions\.weight of the result differs"):
        hf_export.export_hugging_face(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()
