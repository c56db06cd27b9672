"""Fresh weights: each tensor is drawn from (seed, canonical name), so no layout changes them."""

import hashlib
import math

import torch
from torch import Tensor

from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter


def initial_tensor(parameter: Parameter, config: ModelConfig, *, seed: int, pad: int = 1) -> Tensor:
    """The start of one logical weight, float32 of its full shape.

    Linear weights and tokens: N(0, init_std) cut at 3 sigma; residual outputs 0; positions
    init_std / 30 (CM3leon). Bridges: q, k, v Xavier-uniform with gain 1/sqrt(2), outputs
    init_std / sqrt(2 L) or 0; projection N(0, 1/sqrt(d)) or [I/2, I/2] (the authors' code).
    Between a shared table and a narrower tower: the tower's width of I.
    Row `pad` of the token table and of an untied head, and of the unused first rows of the
    positions, is zero.
    """
    shape = parameter.shape
    generator = torch.Generator().manual_seed(_seed(seed, parameter.name))
    match parameter.start:
        case "normal":
            value = _truncated(shape, config.init_std, generator)
        case "position":
            value = _truncated(shape, config.init_std / 30, generator)
        case "scaled":
            std = config.init_std / math.sqrt(2 * config.num_layers)
            value = _truncated(shape, std, generator)
        case "xavier":
            bound = math.sqrt(6 / (shape[0] + shape[1])) / math.sqrt(2)
            value = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        case "projection":
            value = torch.randn(shape, generator=generator) / math.sqrt(shape[0])
        case "half":
            widths = [config.towers[name].hidden_size for name in config.tower_names]
            value = torch.cat([torch.eye(shape[0], width) / 2 for width in widths], dim=1)
        case "eye":
            value = torch.eye(*shape)
        case "zero":
            value = torch.zeros(shape)
        case "one":
            value = torch.ones(shape)
    if parameter.is_vocabulary:
        value[pad] = 0
    elif parameter.start == "position" and pad < config.position_offset:
        value[pad] = 0  # metaseq counts positions from the row behind the padding's
    return value


def drawn_row(token: str, width: int, std: float, *, seed: int) -> Tensor:
    """float32 [width]: a fresh row of a token table, N(0, std) cut at 3 sigma, of (seed, token)."""
    return _truncated((width,), std, torch.Generator().manual_seed(_seed(seed, token)))


def _truncated(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    value = torch.empty(shape)
    return torch.nn.init.trunc_normal_(value, 0.0, std, -3 * std, 3 * std, generator=generator)


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
