"""The weighted average against its specification, bit for bit."""

import pytest
import torch
from torch import Tensor

from megatron_jam.ops import reference
from megatron_jam.ops.average import weighted_average

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def numbers(dtype: torch.dtype, seed: int) -> Tensor:
    """Of every size that a format knows, subnormal, infinite and NaN ones among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.itemsize == 2:  # every bit pattern, in some order
        return torch.randperm(1 << 16, generator=generator).to(torch.uint16).view(dtype)
    scale = torch.exp2(torch.randint(-300, 300, (50_000,), generator=generator).double())
    values = (torch.randn(50_000, generator=generator, dtype=torch.float64) * scale).to(dtype)
    values[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    return values[torch.randperm(len(values), generator=generator)]


@pytest.mark.parametrize("share", [0.5, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(dtype: torch.dtype, share: float) -> None:
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    found, due = weighted_average(a, b, share), reference.weighted_average(a, b, share)
    assert found.dtype == dtype
    finite = ~due.isnan()
    assert 0 < int(finite.sum()) < len(due)
    assert torch.equal(found.isnan(), due.isnan())
    assert torch.equal(found[finite], due[finite])
    assert torch.equal(torch.signbit(found[finite]), torch.signbit(due[finite]))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_mean_of_a_tensor_and_itself_is_the_tensor(dtype: torch.dtype, share: float) -> None:
    a = numbers(dtype, 1)
    a = a[a.isfinite()]
    assert torch.equal(weighted_average(a, a, share), a)


@pytest.mark.parametrize("size", [0, 1, 7, 16, 33])
def test_any_size_and_stride(size: int) -> None:
    a, b = torch.arange(3.0 * size).view(3, size).T, torch.ones(size, 3)
    found = weighted_average(a, b, 0.25)
    assert found.shape == (size, 3)
    assert torch.equal(found, a * 0.25 + 0.75)


def test_unlike_dtypes_meet_in_one_that_holds_both() -> None:
    a, b = torch.tensor([1.0], dtype=torch.float16), torch.tensor([2.0], dtype=torch.bfloat16)
    assert torch.equal(weighted_average(a, b, 0.5), torch.tensor([1.5]))


def test_into_columns_of_a_matrix() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    whole = torch.full((2, 7), -1.0)
    found = weighted_average(a, b, 0.25, whole[:, 2:5])
    assert found.data_ptr() == whole[:, 2:].data_ptr()
    assert torch.equal(whole[:, 2:5], a * 0.25 + 0.75)
    assert torch.equal(whole[:, :2], torch.full((2, 2), -1.0))
    assert torch.equal(whole[:, 5:], torch.full((2, 2), -1.0))


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="out is neither contiguous nor a matrix of whole rows"):
        weighted_average(torch.ones(2, 2), torch.ones(2, 2), 0.5, torch.ones(2, 2, 2)[:, :, 0])
    with pytest.raises(ValueError, match=r"a is Float \[2\], out is Double \[2\]"):
        weighted_average(torch.ones(2), torch.ones(2), 0.5, torch.ones(2).double())
    with pytest.raises(ValueError, match=r"a is Float \[2\], b is Float \[3\]"):
        weighted_average(torch.ones(2), torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="Int is no number format here"):
        weighted_average(torch.ones(2).int(), torch.ones(2).int(), 0.5)
