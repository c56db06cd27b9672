"""Our Adam is torch's AdamW with the state that Megatron's optimizer can save and load."""

import copy

import pytest
import torch

from megatron_jam.parallel.adam import Adam

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7,), (2, 2)]
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in shapes]


def groups(tensors: list[torch.nn.Parameter]) -> list[dict]:
    """Decayed and undecayed, as Megatron groups them."""
    return [
        {"params": [tensors[0], tensors[2]], "weight_decay": 0.1},
        {"params": [tensors[1]], "weight_decay": 0.0},
    ]


def set_gradients(tensors: list[torch.nn.Parameter], step: int) -> None:
    """The same for each call with `step`; the last tensor has none."""
    g = torch.Generator().manual_seed(100 + step)
    for tensor in tensors[:-1]:
        tensor.grad = torch.randn(tensor.shape, generator=g, dtype=tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_steps_are_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = Adam(groups(ours), **SETTINGS)
    reference = torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS)
    for step in range(5):
        rate = 1e-2 / (step + 1)  # a schedule sets it from outside
        for optimizer, tensors in ((mine, ours), (reference, theirs)):
            set_gradients(tensors, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ours[2], parameters(dtype)[2])  # no gradient, no decay either


def test_state_is_apexs() -> None:
    """The step in the group, two moments of the parameter's shape and nothing else."""
    tensors = parameters(torch.float32)
    optimizer = Adam(groups(tensors), **SETTINGS)
    for step in range(3):
        set_gradients(tensors, step)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for tensor in tensors[:2]:
        state = optimizer.state[tensor]
        assert set(state) == {"exp_avg", "exp_avg_sq"}
        assert all(v.shape == tensor.shape and v.dtype is tensor.dtype for v in state.values())
    assert tensors[2] not in optimizer.state


def test_state_moves_to_a_fresh_optimizer() -> None:
    ours, fresh = parameters(torch.float32), parameters(torch.float32)
    optimizer = Adam(groups(ours), **SETTINGS)
    for step in range(2):
        set_gradients(ours, step)
        optimizer.step()
    with torch.no_grad():
        for target, source in zip(fresh, ours, strict=True):
            target.copy_(source)
    other = Adam(groups(fresh), **SETTINGS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, tensors in ((optimizer, ours), (other, fresh)):
        set_gradients(tensors, 2)
        one.step()
    assert other.param_groups[0]["step"] == 3
    assert all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))


def test_coupled_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        Adam(groups(parameters(torch.float32)), adam_w_mode=False)
