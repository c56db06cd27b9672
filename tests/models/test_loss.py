"""Cross-entropy over a split vocabulary is torch's over the whole one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import padded_vocabulary
from megatron_jam.models.loss import vocab_parallel_cross_entropy
from megatron_jam.parallel.world import World
from tests.helpers.pool import WorkerPool

LENGTH, BATCH = 7, 3


def material(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Wide-ranging logits [S, B, V], labels with the first and last id, a weight a position."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(LENGTH, BATCH, vocabulary, generator=g, dtype=torch.float64) * 8
    labels = torch.randint(vocabulary, (LENGTH, BATCH), generator=g)
    labels[0, 0], labels[0, 1] = 0, vocabulary - 1
    weight = torch.rand(LENGTH, BATCH, generator=g, dtype=torch.float64)
    return logits.to(dtype), labels, weight


def direct(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """torch's loss and the gradient of its weighted sum, in the dtype of `logits`."""
    logits = logits.clone().requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = loss.view_as(labels)
    (loss * weight.to(loss.dtype)).sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def split(world: World, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's loss and its share of the gradient; padding holds large logits."""
    logits, labels, weight = material(vocabulary, dtype)
    rows = padded_vocabulary(vocabulary, world.tensor.size)
    local = rows // world.tensor.size
    first = world.tensor.rank * local
    padded = F.pad(logits, (0, rows - vocabulary), value=1e4)
    share = padded[..., first : first + local].contiguous().requires_grad_()
    num_real = max(0, min(local, vocabulary - first))
    loss = vocab_parallel_cross_entropy(share, labels, num_real=num_real, group=world.groups.tp)
    (loss * weight.to(loss.dtype)).sum().backward()
    assert share.grad is not None
    return loss.detach(), share.grad


# 5 ids at TP=4 leave the last rank nothing but padding.
@pytest.mark.parametrize("vocabulary", [101, 5])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_equals_torch(
    pool: WorkerPool, vocabulary: int, tensor: int, dtype: torch.dtype, tolerance: float
) -> None:
    loss, gradient = direct(*material(vocabulary, dtype))
    results = pool.run(split, ParallelConfig(tensor=tensor), vocabulary, dtype)
    for value, _ in results:
        assert value.dtype is dtype
        assert torch.allclose(value, loss, rtol=tolerance, atol=tolerance)
    whole = torch.cat([share for _, share in results], dim=-1)
    assert torch.count_nonzero(whole[..., vocabulary:]) == 0
    assert torch.allclose(whole[..., :vocabulary], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tensor", [1, 2])
def test_bf16_logits_are_summed_in_fp32(pool: WorkerPool, tensor: int) -> None:
    logits, labels, weight = material(101, torch.bfloat16)
    loss, gradient = direct(logits.float(), labels, weight)
    results = pool.run(split, ParallelConfig(tensor=tensor), 101, torch.bfloat16)
    for value, share in results:
        assert value.dtype is torch.float32
        assert share.dtype is torch.bfloat16
        assert torch.allclose(value, loss, rtol=1e-5, atol=1e-5)
    whole = torch.cat([share for _, share in results], dim=-1)[..., :101]
    # One rounding to bf16 at the end, 8 bits.
    assert torch.allclose(whole.float(), gradient, rtol=2**-8, atol=1e-6)
