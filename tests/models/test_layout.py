"""Layouts that a model cannot take are refused by the name of the setting."""

import pytest

from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.jam import check_layout
from tests.helpers.pico import LLAMA, pico_config


@pytest.mark.parametrize(
    ("settings", "tensor", "words"),
    [
        ({}, 8, "parallel.tensor 8 does not divide num_heads 4 of tower main"),
        (LLAMA, 8, "parallel.tensor 8 does not divide num_kv_heads 4 of tower main"),
        ({"ffn_size": 66}, 4, "parallel.tensor 4 does not divide ffn_size 66 of tower main"),
    ],
)
def test_tensor_degree_must_divide(settings: dict, tensor: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_layout(pico_config("tower", **settings), ParallelConfig(tensor=tensor))
