"""Forward FLOPs a token of a model's parts, which stages are balanced by and plans are made with.

A multiply-add is two FLOPs. Matrices alone count: norms, activations and sums are a few per mille.
"""

import math
from typing import Literal

from megatron_jam.config.model import IMAGE, MAIN, TEXT, ModelConfig
from megatron_jam.models.parameters import parameter_table

Attention = Literal["causal", "full"]
"""How attention is counted over n tokens: what causality asks for, where a token reads (n + 1) / 2
of them on average, or whole score matrices, n, which plain kernels compute and other programs
count."""


def layer_flops(
    model: ModelConfig, context_length: int, attention: Attention = "causal"
) -> list[tuple[int, int]]:
    """For each of the model's layers the FLOPs a token of its towers and of its bridges.

    Attention runs over `context_length` tokens, in two products of the reader's width with each
    token that is read.
    """
    read_twice = context_length + 1 if attention == "causal" else 2 * context_length
    towers, bridges = [0] * model.num_layers, [0] * model.num_layers
    for entry in parameter_table(model):
        if entry.layer is not None and len(entry.shape) == 2:
            part = bridges if entry.name.startswith("bridges.") else towers
            part[entry.layer] += 2 * math.prod(entry.shape)
    for layer in range(model.num_layers):
        for name, tower in model.towers.items():
            scores = 2 * read_twice * tower.hidden_size
            towers[layer] += scores if model.tower_layer(name, layer) is not None else 0
            bridges[layer] += scores if name in model.bridges_into(layer) else 0
    return list(zip(towers, bridges, strict=True))


def embedding_flops(model: ModelConfig) -> int:
    """FLOPs a token of the projections from a shared table to narrower towers."""
    return _projections(model, "embedding.")


def head_flops(model: ModelConfig) -> int:
    """FLOPs a token of the head: its projections and the output rows, each read by one state."""
    rows = {MAIN: model.vocab_size}
    if model.table_names != (MAIN,):
        num_text = model.text_ids[1]
        rows = {IMAGE: model.vocab_size - num_text, TEXT: num_text}
    outputs = sum(2 * count * model.table_width(table) for table, count in rows.items())
    return _projections(model, "head.") + outputs


def _projections(model: ModelConfig, room: str) -> int:
    matrices = [e for e in parameter_table(model) if e.name.startswith(room) and e.is_new]
    return sum(2 * math.prod(entry.shape) for entry in matrices)
