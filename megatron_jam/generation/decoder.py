"""Batched decoding of documents with text and pictures in them, with a key-value cache.

Each row writes text until its `<break>`, then exactly one picture's codes under classifier-free
guidance, the closing `<break>`, then text again until `</s>` (paper section 3.2; JAM's own code).
Rows are independent: each has its own state, positions and random numbers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.generation import SamplingConfig
from megatron_jam.generation.row import Legal, Row, Rules, legal_table
from megatron_jam.generation.stages import Stages
from megatron_jam.generation.streams import Streams
from megatron_jam.models.parameters import padded_vocabulary
from megatron_jam.ops.sharded_sampling import guided_sample_sharded
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.document import Tokens, unconditional_prompt
from megatron_jam.tokenizers.vocabulary import JointVocabulary

POLL_EVERY = 32
"""Tokens of each row between two calls of `poll`."""


class Decoder:
    """Writes behind prompts with one model."""

    def __init__(
        self, stages: Stages, world: World, vocabulary: JointVocabulary, *, tokens_per_image: int
    ) -> None:
        """Take the model in `stages`, which replicas of `world` each have whole.

        Raises:
            UsageError: the layout, the vocabulary or max_positions does not serve.
        """
        config = stages.config
        if world.parallel.sequence:
            raise UsageError("parallel.sequence is set; generation goes token by token: unset it")
        if vocabulary.size != config.vocab_size:
            raise UsageError(
                f"the vocabulary has {vocabulary.size} ids, the model {config.vocab_size}"
            )
        # The shortest document with a picture: `[E] <sentinel:0> [B]`, the codes, `[B]`.
        shortest = len(unconditional_prompt(vocabulary)) + tokens_per_image + 1
        if tokens_per_image < 1 or shortest > config.max_positions:
            raise UsageError(
                f"max_positions {config.max_positions} is too short for a picture of"
                f" {tokens_per_image} codes, which takes {shortest}; use another image tokenizer"
            )
        self._stages, self._world, self._vocabulary = stages, world, vocabulary
        self._tokens_per_image = tokens_per_image
        share = padded_vocabulary(vocabulary.size, world.tensor.size) // world.tensor.size
        legal = torch.zeros(len(Legal), share * world.tensor.size, dtype=torch.bool)
        legal[:, : vocabulary.size] = torch.from_numpy(legal_table(vocabulary))
        self._codes = (vocabulary.image.start, vocabulary.image.stop)
        self._legal = legal[:, world.tensor.rank * share :][:, :share].to(world.device)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Tokens],
        settings: SamplingConfig,
        *,
        first_index: int = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> list[Tokens]:
        """Write behind each prompt; all ranks of a replica call this and get the same.

        Args:
            prompts: joint ids int64 [n] each, of unlike lengths, as tokenizers/document.py lays
                them out; one that ends in a picture goes on with the picture.
            settings: how to draw.
            first_index: number of the first prompt; the draws of a prompt depend on its number
                and not on the other prompts, so a long list can be cut into batches.
            poll: called after every few tokens, on all ranks; what it raises ends the writing.

        Returns:
            The new tokens of each prompt, int64: up to and including `</s>`, or as far as
            max_new_tokens or the model's positions reach.

        Raises:
            UsageError: a prompt is empty or leaves no room.
        """
        rules = Rules(
            vocabulary=self._vocabulary,
            tokens_per_image=self._tokens_per_image,
            max_positions=self._stages.config.max_positions,
            max_new_tokens=settings.max_new_tokens,
        )
        rows = [Row(rules, prompt, index=first_index + i) for i, prompt in enumerate(prompts)]
        if not rows:
            return []
        self._stages.eval()
        streams = Streams(self._stages, rows, rules, guided=settings.guidance_scale != 1)
        try:
            num_drawn = 0
            while not all(row.done for row in rows):
                tokens = self._draw(rows, *streams.step(), settings)
                for row, token in zip(rows, tokens, strict=True):
                    if not row.done:
                        row.push(token)
                num_drawn += 1
                if num_drawn % POLL_EVERY == 0:
                    poll()
        finally:
            streams.cache.detach()
        return [row.new_tokens for row in rows]

    def _draw(
        self, rows: list[Row], cond: Tensor, uncond: Tensor | None, settings: SamplingConfig
    ) -> list[int]:
        """One legal token for each row; this rank's logits [N, padded V / TP].

        Rows in pictures are guided, and read the logits of picture codes alone; those in text are
        not guided.
        """
        tokens = [0] * len(rows)
        for picture in (True, False):
            chosen = [i for i, row in enumerate(rows) if row.in_picture == picture and not row.done]
            if not chosen:
                continue
            alike = [rows[i] for i in chosen]
            guided = picture and uncond is not None
            drawn = guided_sample_sharded(
                _rows_of(cond, chosen),
                _rows_of(uncond, chosen) if guided else None,
                group=self._world.groups.tp,
                guidance_scale=settings.guidance_scale if guided else 1.0,
                temperature=settings.temperature if picture else settings.text_temperature,
                top_p=settings.top_p if picture else settings.text_top_p,
                legal=self._codes if picture else self._legal[[row.legal for row in alike]],
                seed=torch.full((len(alike),), settings.seed),
                offset=torch.tensor([(row.index << 32) + len(row.tokens) for row in alike]),
            )
            for i, token in zip(chosen, drawn.tokens.tolist(), strict=True):
                tokens[i] = token
        return tokens


def _rows_of(logits: Tensor, chosen: list[int]) -> Tensor:
    """The chosen rows, in a number format that is drawn from."""
    if len(chosen) < len(logits):
        logits = logits[chosen]
    return logits.float() if logits.dtype == torch.float64 else logits
