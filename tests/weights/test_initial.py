"""Fresh weights: their spread, what is zero, and that (seed, name) alone decide them."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megatron_jam.config.model import BridgeConfig, ModelConfig, TowerConfig
from megatron_jam.models.parameters import PROJECTION, TOKENS, Parameter, parameter_table
from megatron_jam.weights.initial import initial_tensor

D = 64


def config_of(**changes: object) -> ModelConfig:
    tower = TowerConfig(num_layers=3, hidden_size=D, num_heads=4, bias=True, affine_norm=True)
    config = ModelConfig(
        towers={"image": tower, "text": tower}, vocab_size=500, max_positions=250, init_std=0.02
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def entry(config: ModelConfig, name: str) -> Parameter:
    return next(e for e in parameter_table(config) if e.name == name)


def draw(name: str, seed: int = 0, **changes: object) -> Tensor:
    config = config_of(**changes)
    return initial_tensor(entry(config, name), config, seed=seed)


# Standard deviation of N(0, 1) cut at 3 sigma.
CUT = 0.98658


@pytest.mark.parametrize(
    ("name", "std"),
    [
        (TOKENS, 0.02),
        ("layers.1.text.attention.q.weight", 0.02),
        ("layers.2.image.ffn.fc1.weight", 0.02),
        ("embedding.positions.weight", 0.02 / 30),
        ("bridges.0.text.ffn.fc1.weight", 0.02),
        ("bridges.2.image.attention.out.weight", 0.02 / math.sqrt(6)),
        ("bridges.0.image.ffn.fc2.weight", 0.02 / math.sqrt(6)),
    ],
)
def test_spread_and_cut(name: str, std: float) -> None:
    value = draw(name)
    assert value.dtype is torch.float32
    # The estimate's own spread is std / sqrt(2 n), n >= 4096.
    assert value.std().item() == pytest.approx(CUT * std, rel=0.05)
    assert abs(value.mean().item()) < 4 * std / math.sqrt(value.numel())
    assert 2.5 * std < value.abs().max().item() <= 3 * std


def test_bridge_projections_are_xavier() -> None:
    bound = math.sqrt(6 / (2 * D)) / math.sqrt(2)
    for kind in "qkv":
        value = draw(f"bridges.0.text.attention.{kind}.weight")
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert 0.98 * bound < value.abs().max().item() <= bound


def test_projection_as_the_authors() -> None:
    """N(0, 1 / sqrt(d)), not cut."""
    value = draw(PROJECTION)
    assert value.shape == (D, 2 * D)
    assert value.std().item() == pytest.approx(D**-0.5, rel=0.05)


def test_half_projection_is_the_mean_of_both_towers() -> None:
    value = draw(PROJECTION, projection_start="half")
    states = torch.arange(2.0 * D)
    assert torch.equal(value @ states, (states[:D] + states[D:]) / 2)


def test_zeros_and_ones() -> None:
    for name in (TOKENS, "embedding.positions.weight"):
        value = draw(name)
        assert torch.count_nonzero(value[1]) == 0  # <pad>
        assert (torch.count_nonzero(value, dim=1) == 0).sum() == 1
    for name in ("attention.out.weight", "ffn.fc2.weight", "attention.q.bias", "ffn_norm.bias"):
        assert torch.count_nonzero(draw(f"layers.0.text.{name}")) == 0
    assert torch.equal(draw("layers.0.text.ffn_norm.weight"), torch.ones(D))
    assert torch.equal(draw("head.norm.weight"), torch.ones(D))


def test_zero_bridges_add_nothing_but_can_learn() -> None:
    bridges = BridgeConfig(every=2, start="zero")
    for name in ("attention.out.weight", "ffn.fc2.weight"):
        assert torch.count_nonzero(draw(f"bridges.0.text.{name}", bridges=bridges)) == 0
    for name in ("attention.q.weight", "attention.v.weight", "ffn.fc1.weight"):
        assert torch.count_nonzero(draw(f"bridges.0.text.{name}", bridges=bridges)) > 4000


def test_seed_and_name_alone_decide() -> None:
    name = "layers.1.text.attention.q.weight"
    torch.manual_seed(1)
    one = draw(name)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw(name), one)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    # Another vocabulary, length, bridges or projection changes no other tensor.
    changes = {"vocab_size": 99, "max_positions": 7, "bridges": BridgeConfig(every=1)}
    assert torch.equal(draw(name, **changes, projection_start="half"), one)
    assert not torch.equal(draw(name, seed=1), one)
    for other in ("layers.1.image.attention.q", "layers.1.text.attention.k"):
        assert not torch.equal(draw(f"{other}.weight"), one)
