"""Tokens have the right kinds; weights change gradients alone; reports add up by set and kind."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.data import Cm3Config
from megatron_jam.config.errors import UsageError
from megatron_jam.config.loss import LossConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.cm3 import Cm3Transform
from megatron_jam.data.sample import Block
from megatron_jam.models.parameters import parameter_table
from megatron_jam.models.sharding import logical_gradients
from megatron_jam.parallel.world import World
from megatron_jam.training.losses import KINDS, Kinds, Losses, mean_by_modality
from megatron_jam.training.optimizer import wrap_chunks
from megatron_jam.training.step import ForwardBackward
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.load import gather_whole
from megatron_jam.weights.reference import reference_logits
from tests.helpers.pico import pico_config, pico_folder, pico_vocabulary
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build, distance, split_batch

VOCABULARY = pico_vocabulary()
TEXT_ID, CODE = 10, VOCABULARY.image.start
S0, S1 = VOCABULARY.sentinel(0), VOCABULARY.sentinel(1)
EOS, EOSS, BREAK, PAD = VOCABULARY.eos, VOCABULARY.eoss, VOCABULARY.break_, VOCABULARY.pad


def kinds_of(*rows: list[int]) -> list[list[str]]:
    found = Kinds(VOCABULARY)(torch.tensor(rows)).tolist()
    return [[KINDS[kind] for kind in row] for row in found]


def test_kinds_without_spans() -> None:
    row = [EOS, TEXT_ID, BREAK, CODE, CODE, EOS]
    assert kinds_of(row) == [["special", "text", "special", "image", "image", "special"]]


def test_moved_spans_are_infill() -> None:
    """a <0> c <1> | <0> b <eoss> <1> code <eoss> in one row, nothing moved in the other."""
    moved = [TEXT_ID, S0, TEXT_ID, S1, S0, TEXT_ID, EOSS, S1, CODE, EOSS]
    plain = [TEXT_ID] * 9 + [PAD]
    first, second = kinds_of(moved, plain)
    special = "special"
    assert first[:4] == ["text", special, "text", special]
    assert first[4:] == [special, "infill", special, special, "infill", special]
    assert second == ["text"] * 9 + [special]


def test_a_row_that_begins_within_a_moved_span() -> None:
    """Labels lack a block's first token, here the sentinel in the span's old place."""
    assert kinds_of([TEXT_ID, S0, TEXT_ID, EOSS, TEXT_ID])[0] == [
        *("text", "special", "infill", "special", "text")
    ]


@pytest.mark.parametrize("seed", range(20))
def test_infill_is_what_cm3_moved(seed: int) -> None:
    """As many tokens are infill as spans have taken from their places."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 300, size=64).astype(np.int32)
    tokens[20:36] = VOCABULARY.image.start + rng.integers(0, 16, size=16)
    tokens[[19, 36]] = BREAK
    block = Block.of(tokens, np.zeros(64, dtype=np.int32))
    transform = Cm3Transform(VOCABULARY, Cm3Config(mean_spans=2.0))
    out = transform(block, seed=seed, index=0).tokens
    ends = np.flatnonzero(out == EOSS)
    sentinels = np.flatnonzero((out >= S0) & (out < VOCABULARY.sentinels.stop))
    starts = sentinels[len(sentinels) // 2 :]
    assert len(starts) == len(ends)
    due = sum(int(b - a - 1) for a, b in zip(starts, ends, strict=True))
    kinds = Kinds(VOCABULARY)(torch.from_numpy(out)[None])
    assert int((kinds == KINDS.index("infill")).sum()) == due


def losses_of(sums: list[list[float]], counts: list[list[float]]) -> Losses:
    return Losses(sums=torch.tensor(sums).double(), counts=torch.tensor(counts).double())


def test_reports() -> None:
    losses = losses_of([[6, 4, 0, 0], [0, 10, 0, 0]], [[2, 1, 0, 0], [0, 2, 0, 0]])
    assert losses.mean == 4
    assert losses.by_modality() == {"text": 3, "image": pytest.approx(14 / 3)}
    assert losses.by_set(["pairs", "codes"]) == {"pairs": pytest.approx(10 / 3), "codes": 5}
    assert losses.tokens() == {"text": 2, "image": 3}
    assert Losses.total([losses, losses]).counts.sum() == 10


def test_average_over_sets_counts_each_alike() -> None:
    small, large = (
        losses_of([[2, 0, 0, 0]], [[1, 0, 0, 0]]),
        losses_of([[400, 50, 0, 0]], [[100, 50, 0, 0]]),
    )
    found = mean_by_modality({"small": small, "large": large})
    assert found == {"all": pytest.approx((2 + 3) / 2), "text": 3, "image": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"z": -1}, "loss.z"), ({"text": float("nan")}, "loss.text"), ({"image": -0.1}, "loss.image")],
)
def test_wrong_options_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LossConfig(**settings)


def test_something_must_count() -> None:
    with pytest.raises(UsageError, match="nothing counts"):
        LossConfig(text=0, image=0, special=0, infill=0)


WEIGHTED = LossConfig(text=1, image=0.25, special=0, infill=2, z=0.01)


def batch() -> dict[str, Tensor]:
    """Two samples of two sets, with moved spans."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 300, (2, 17), generator=g)
    tokens[:, 5:9] = CODE + torch.randint(16, (2, 4), generator=g)
    tokens[1, [3, 11, 15]] = torch.tensor([S0, S0, EOSS])
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (torch.rand(2, 16, generator=g) > 0.2).float(),
        "positions": torch.arange(16).expand(2, -1).contiguous(),
        "sets": torch.tensor([0, 2]),
    }


def run(world: World, path: Path) -> tuple[Losses, dict[str, Tensor]] | None:
    folder = WeightsFolder(path)
    chunks = build(folder, world, torch.float64, z_loss=WEIGHTED.z)
    wrapped = wrap_chunks(chunks, world, distributed_optimizer=False)
    step = ForwardBackward(wrapped, world, folder.vocabulary, loss=WEIGHTED, num_sets=3)
    losses = step(split_batch(batch(), world, 1))
    local: dict[str, Tensor] = {}
    for chunk in chunks:
        local.update(logical_gradients(chunk, lambda p: p.main_grad))
    table = parameter_table(folder.config)
    whole = dict(gather_whole(table, local, world, torch.float64))
    if world.rank != 0:
        return None
    return losses, {name: each / losses.num_tokens for name, each in whole.items()}


@pytest.mark.parametrize(
    ("parallel", "data"),
    [
        (ParallelConfig(), 1),
        (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1),
        (ParallelConfig(), 2),
    ],
    ids=["one", "tp2-pp2-sp", "dp2"],
)
def test_weights_and_z_loss_under_layouts(
    pool: WorkerPool, parallel: ParallelConfig, data: int, tmp_path: Path
) -> None:
    """Gradients are those of the weighted sum over the number of counted tokens; the report is
    without weights."""
    config = dataclasses.replace(pico_config("cross", activation="gelu"))
    path = pico_folder(tmp_path / "weights", config)
    reported, gradients = pool.run(run, parallel, path, data=data)[0]

    folder, given = WeightsFolder(path), batch()
    weights = {n: folder.read(n).requires_grad_() for n in folder.names}
    logits = reference_logits(config, weights.__getitem__, given["tokens"])
    nats = F.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), reduction="none")
    kinds = Kinds(VOCABULARY)(given["labels"]).flatten()
    counts = torch.tensor([WEIGHTED.text, WEIGHTED.image, WEIGHTED.special, WEIGHTED.infill])
    mask = given["loss_mask"].flatten().double()
    with_z = nats + WEIGHTED.z * logits.flatten(0, 1).logsumexp(-1) ** 2
    ((with_z * mask * counts[kinds]).sum() / mask.sum()).backward()
    assert distance({n: w.grad for n, w in weights.items()}, gradients) < 1e-7

    assert set(kinds[mask > 0].tolist()) == set(range(4)), "a kind is missing"
    for number in range(3):
        for kind in range(4):
            row = given["sets"].repeat_interleave(16) == number
            cell = mask * (kinds == kind) * row
            assert reported.counts[number, kind] == cell.sum()
            due = float((nats * cell).sum().detach())
            assert float(reported.sums[number, kind]) == pytest.approx(due, rel=1e-10, abs=1e-10)
