"""Causal attention on already projected heads, with an optional key-value cache.

Shape letters: S sequence, B batch, N heads, H head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalAttention(nn.Module):
    """Megatron's core-attention slot: softmax(q k^T / sqrt(H)) v, each position seeing its past.

    Serves self-attention and bridges alike: in a bridge key and value come from the other tower,
    and position t sees its positions <= t (the authors' code; eq. 5 omits V, a slip).
    """

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.cache: LayerCache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, H].
            key: [S, B, N, H].
            value: [S, B, N, H].

        Returns:
            [S, B, N*H].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None
        if self.cache is not None:
            k, v, mask = self.cache.extend(k, v)
        elif q.dtype is torch.bfloat16 and q.device.type == "cpu":
            # There torch's kernel for the gradient is three times slower in bf16 than in fp32.
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out = out.to(query.dtype)
        length, batch = query.shape[:2]
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1)


class KeyValueCache:
    """Keys and values of every attention of a model (towers and bridges) for a batch of rows.

    Each row has its own length, so prompts of unlike lengths share a batch without left padding:
    new entries are written behind each row's length, and whatever lies beyond it is never seen.
    Before each forward call :meth:`open`, after it :meth:`advance` by how many of the tokens count;
    what the others wrote is overwritten later.
    """

    def __init__(
        self, model: nn.Module, *, rows: int, capacity: int, device: torch.device | str = "cpu"
    ) -> None:
        """Hold `capacity` positions for each of `rows` sequences."""
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.capacity = capacity
        self.device = torch.device(device)
        self.rows = slice(0, 0)
        self._layers = [m for m in model.modules() if isinstance(m, CausalAttention)]
        for attention in self._layers:
            attention.cache = LayerCache(self)

    def open(self, num_rows: int, num_tokens: int, *, first_row: int = 0) -> Tensor:
        """Make room for a forward of `num_tokens` in each of `num_rows` rows from `first_row` on.

        Returns:
            The tokens' positions int64 [B, S], counted from 0, on the model's device.
        """
        self.rows = slice(first_row, first_row + num_rows)
        starts = self.lengths[self.rows]
        self.used = int(starts.max()) + num_tokens
        assert self.used <= self.capacity, "the cache is full"
        self.places = (starts[:, None] + torch.arange(num_tokens)).to(self.device)
        self.row_ids = torch.arange(self.rows.start, self.rows.stop, device=self.device)[:, None]
        behind = torch.arange(self.used, device=self.device)
        self.visible = (behind <= self.places[:, :, None])[:, None]  # [B, 1, S, used]
        return self.places

    def advance(self, num_tokens: Tensor) -> None:
        """Keep the first `num_tokens`, int64 [B], of what the last forward wrote in each row."""
        self.lengths[self.rows] += num_tokens

    def detach(self) -> None:
        """Give the model back its attention without a cache."""
        for attention in self._layers:
            attention.cache = None


class LayerCache:
    """The part of a KeyValueCache that one attention owns."""

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache
        self._keys = self._values = torch.empty(0)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write new entries [B, N, S, H] behind the rows' lengths.

        Returns:
            Keys and values [B, N, used, H], and the mask bool [B, 1, S, used] of what each new
            position may see.
        """
        cache = self._cache
        if not self._keys.numel():
            shape = (cache.lengths.numel(), key.shape[1], cache.capacity, key.shape[3])
            self._keys, self._values = key.new_zeros(shape), value.new_zeros(shape)
        # An index between slices moves to the front: the assigned shape is [B, S, N, H].
        self._keys[cache.row_ids, :, cache.places] = key.transpose(1, 2)
        self._values[cache.row_ids, :, cache.places] = value.transpose(1, 2)
        keys, values = (x[cache.rows, :, : cache.used] for x in (self._keys, self._values))
        return keys, values, cache.visible
