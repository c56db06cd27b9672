"""A model in training, as one that decodes: the same weights in other layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_jam.models.jam import JamModel
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.world import World


def decoding_twin(chunks: Sequence[JamModel], world: World) -> tuple[list[JamModel], World]:
    """The same weights in torch's layers, each of whose ranks sees all tokens; without dropout.

    A token at a time cannot be split over ranks as training's sequences are, and the key-value
    cache is torch's layers'. Nothing is copied: both models hold the same parameters, so that the
    twin is what the weights are at any time.

    Args:
        chunks: this rank's model, of any backend and layout.
        world: its ranks.

    Returns:
        As many chunks, and the ranks as they see them.
    """
    parallel = replace(world.parallel, sequence=False, context=1)
    plain = replace(world, parallel=parallel)
    made = []
    for number, chunk in enumerate(chunks):
        twin = JamModel(
            chunk.model_config,
            replace(plain, device=torch.device("meta")),
            dtype=chunk.config.params_dtype,
            main_gradients=False,
            chunk=number,
        )
        held = {holder.key: holder.parameter for holder in holders(chunk)}
        names = [name for name, _ in twin.named_parameters()]
        for name, holder in zip(names, holders(twin), strict=True):
            module, _, attribute = name.rpartition(".")
            twin.get_submodule(module).register_parameter(attribute, held[holder.key])
        made.append(twin)
    return made, plain
