"""A model's chunks on the stages of a pipeline, run one after the other for every token."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import padded_vocabulary
from megatron_jam.parallel.world import World

Call = Callable[..., Tensor]
"""Runs a chunk with the arguments of JamModel."""


class Stages:
    """The whole model, as far as generation is concerned; all ranks call each method.

    There is nothing for a schedule to fill the stages with: a token waits for the one before it.
    """

    def __init__(
        self, chunks: Sequence[JamModel], world: World, calls: Sequence[Call] | None = None
    ) -> None:
        """Run `chunks`, through `calls` where something is wrapped around them."""
        self.chunks, self._world = chunks, world
        self._calls = chunks if calls is None else calls
        self.config, self.device = chunks[0].model_config, world.device

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        for chunk in self.chunks:
            chunk.eval()

    def fill(self, tokens: Tensor, positions: Tensor) -> None:
        """Let tokens int64 [B, S] fill the cache; their logits are not computed."""
        self._run(tokens, positions, with_head=False)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What comes behind one token int64 [B, 1] of each row: [B, padded V / TP], the same on all
        stages."""
        world, vocabulary = self._world, self.config.vocab_size
        output = self._run(tokens, positions, with_head=True)
        if output is None:
            share = padded_vocabulary(vocabulary, world.tensor.size) // world.tensor.size
            dtype = self.chunks[0].config.params_dtype
            output = torch.empty(1, len(tokens), share, dtype=dtype, device=self.device)
        return world.broadcast_from_last_stage(output[0])

    def _run(self, tokens: Tensor, positions: Tensor, *, with_head: bool) -> Tensor | None:
        """The last chunk's output, on the stage that has it."""
        pipeline, output = self._world.pipeline, None
        tokens = tokens.to(self._world.device)
        for chunk, call in zip(self.chunks, self._calls, strict=True):
            if not chunk.pre_process:
                config = chunk.config
                shape = (tokens.shape[1], len(tokens), config.hidden_size)
                states = torch.empty(shape, dtype=config.params_dtype, device=self._world.device)
                source = (pipeline.rank - 1) % pipeline.size
                dist.recv(states, group=pipeline.group, group_src=source)
                chunk.set_input_tensor(states)
            output = call(tokens, positions, with_head=with_head)
            if chunk.post_process:
                return output
            target = (pipeline.rank + 1) % pipeline.size
            dist.send(output, group=pipeline.group, group_dst=target)
        return None
