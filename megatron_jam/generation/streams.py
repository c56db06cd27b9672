"""The model under a batch of rows: one key-value cache for documents and unconditional streams."""

import torch
from torch import Tensor, nn

from megatron_jam.generation.row import Row, Rules
from megatron_jam.generation.stages import Stages
from megatron_jam.models.attention import KeyValueCache
from megatron_jam.tokenizers.document import unconditional_prompt


class Streams:
    """Logits of what comes next in N rows. Cache rows 0..N-1 hold the documents, N..2N-1 the
    unconditional streams of the pictures that they are in.

    An unconditional stream rests at `[E] <sentinel:0>` while its document is in text. Streams that
    rest or are done take part in a forward without advancing, so that what they wrote is
    overwritten.
    """

    def __init__(self, stages: Stages, rows: list[Row], rules: Rules, *, guided: bool) -> None:
        """Fill the cache with all but the last token of each stream: that is what a step feeds."""
        self._stages, self._rows = stages, rows
        self._guided = guided
        self._rest = len(unconditional_prompt(rules.vocabulary)) - 1
        longest = max(len(row.tokens) for row in rows) + rules.max_new_tokens
        longest += rules.tokens_per_image + 1  # a picture may begin with the last new token
        self.cache = KeyValueCache(
            nn.ModuleList(stages.chunks),
            rows=len(rows) * (2 if guided else 1),
            capacity=min(rules.max_positions, longest),
            device=stages.device,
        )
        try:
            self._prefill([row.tokens[:-1] for row in rows], first_row=0)
            if guided:
                self._prefill([row.unconditional for row in rows], first_row=len(rows))
        except BaseException:
            self.cache.detach()  # nobody else can: there will be no Streams
            raise

    def _prefill(self, streams: list[list[int]], *, first_row: int) -> None:
        """Fill the cache, padded on the right: no token sees what is behind it."""
        lengths = torch.tensor([len(stream) for stream in streams])
        if not lengths.any():
            return
        tokens = torch.zeros(len(streams), int(lengths.max()), dtype=torch.int64)
        for row, stream in zip(tokens, streams, strict=True):
            row[: len(stream)] = torch.tensor(stream, dtype=torch.int64)
        positions = self.cache.open(*tokens.shape, first_row=first_row)
        self._stages.fill(tokens, positions)
        self.cache.advance(lengths)

    def step(self) -> tuple[Tensor, Tensor | None]:
        """Feed every stream's last token.

        Returns:
            This rank's logits [N, padded V / TP] of what comes next with the text, and without it
            where a row is in a picture and guided (None if no row is).
        """
        num_rows = len(self._rows)
        pictures = torch.tensor([row.in_picture for row in self._rows])
        going = torch.tensor([not row.done for row in self._rows])
        last = torch.tensor([row.tokens[-1] for row in self._rows])
        if self._guided:
            self.cache.lengths[num_rows:][~pictures] = self._rest
        if not (self._guided and pictures.any()):
            return self._forward(last, going), None
        logits = self._forward(last.repeat(2), torch.cat([going, pictures]))
        return logits[:num_rows], logits[num_rows:]

    def _forward(self, tokens: Tensor, going: Tensor) -> Tensor:
        """Logits [B, padded V / TP] after one token int64 [B] of each stream; those `going`
        advance."""
        positions = self.cache.open(len(tokens), 1)
        logits = self._stages.logits(tokens[:, None], positions)
        self.cache.advance(going.long())
        return logits
