"""Loads the compiled extension, whose import registers the operators `torch.ops.megatron_jam.*`.

What Python calls without torch's dispatcher stands here by name: what is for the CPU alone, and a
shorter way to guided sampling.
"""

import torch  # noqa: F401  (the extension needs its libraries)

try:
    from megatron_jam._C import (
        Cm3,
        Order,
        Reader,
        Retrieval,
        draw,
        guided_sample,
        has_sha_lanes,
        pack_greedily,
        sha256_update,
        weighted_average,
    )
except ImportError as error:
    raise ImportError(
        "the compiled extension megatron_jam._C is missing or was built for another torch: "
        f"run `make setup` in the repository ({error})"
    ) from error

__all__ = [
    "Cm3",
    "Order",
    "Reader",
    "Retrieval",
    "draw",
    "guided_sample",
    "has_sha_lanes",
    "pack_greedily",
    "sha256_update",
    "weighted_average",
]
