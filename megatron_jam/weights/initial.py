"""Fresh weights: each number is drawn from (seed, canonical name, place), so no layout changes it
and any rows can be drawn by themselves."""

import hashlib
import math

import torch
from torch import Tensor

from megatron_jam.config.model import ModelConfig
from megatron_jam.models.parameters import Parameter
from megatron_jam.ops.draw import Kind, drawn


def initial_tensor(parameter: Parameter, config: ModelConfig, *, seed: int, pad: int = 1) -> Tensor:
    """All of :func:`initial_rows`: the start of one logical weight, float32 of its shape."""
    return initial_rows(parameter, config, 0, parameter.shape[0], seed=seed, pad=pad)


def initial_rows(
    parameter: Parameter, config: ModelConfig, start: int, stop: int, *, seed: int, pad: int = 1
) -> Tensor:
    """Rows start .. stop - 1 of the start of one logical weight, float32.

    Linear weights and tokens: N(0, init_std) cut at 3 sigma; residual outputs 0; positions
    init_std / 30 (CM3leon). Bridges: q, k, v Xavier-uniform with gain 1/sqrt(2), outputs
    init_std / sqrt(2 L) or 0; projection N(0, 1/sqrt(d)) or [I/2, I/2] (the authors' code).
    Between a shared table and a narrower tower: the tower's width of I.
    Row `pad` of the token table and of an untied head, and of the unused first rows of the
    positions, is zero.
    """
    shape = parameter.shape
    if chosen := _distribution(parameter, config):
        kind, scale = chosen
        width, key = math.prod(shape[1:]), _key(seed, parameter.name)
        value = drawn(kind, key, start * width, (stop - start) * width, scale)
        value = value.view(stop - start, *shape[1:])
    elif parameter.start == "one":
        value = torch.ones(stop - start, *shape[1:])
    elif parameter.start == "eye":
        value = _diagonal(start, stop, shape[1])
    elif parameter.start == "half":
        widths = [config.towers[name].hidden_size for name in config.tower_names]
        value = torch.cat([_diagonal(start, stop, width) / 2 for width in widths], dim=1)
    else:
        value = torch.zeros(stop - start, *shape[1:])
    has_pad = parameter.is_vocabulary or (
        # metaseq counts positions from the row behind the padding's
        parameter.start == "position" and pad < config.position_offset
    )
    if has_pad and start <= pad < stop:
        value[pad - start] = 0
    return value


def _distribution(parameter: Parameter, config: ModelConfig) -> tuple[Kind, float] | None:
    """What a weight is drawn from, and its scale; None of one that is not drawn."""
    shape = parameter.shape
    match parameter.start:
        case "normal":
            return "cut_normal", config.init_std
        case "position":
            return "cut_normal", config.init_std / 30
        case "scaled":
            return "cut_normal", config.init_std / math.sqrt(2 * config.num_layers)
        case "xavier":
            return "uniform", math.sqrt(6 / (shape[0] + shape[1])) / math.sqrt(2)
        case "projection":
            return "normal", 1 / math.sqrt(shape[0])
    return None


def _diagonal(start: int, stop: int, width: int) -> Tensor:
    """Rows of the identity matrix."""
    return (torch.arange(width) == torch.arange(start, stop)[:, None]).float()


def drawn_row(token: str, width: int, std: float, *, seed: int) -> Tensor:
    """float32 [width]: a fresh row of a token table, N(0, std) cut at 3 sigma, of (seed, token)."""
    return drawn("cut_normal", _key(seed, token), 0, width, std)


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
