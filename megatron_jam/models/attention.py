"""Causal attention on already projected heads, rotation, and an optional key-value cache.

Shape letters: S sequence, B batch, N heads, H head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.models.norms import HeadNorm


@dataclass(frozen=True)
class Places:
    """Where the tokens of a batch stand, as attention needs it."""

    angles: Sequence[Tensor | None]
    """For each tower what `rotary_angles` gives, or None if its positions are learned rows."""

    visible: Tensor | None
    """Which tokens each one attends to, bool [B, 1, S, S]; None is all up to itself."""


def visible_tokens(documents: Tensor) -> Tensor:
    """Each token sees those of its own document up to itself.

    Args:
        documents: int64 [B, S], equal for the tokens of one document.

    Returns:
        bool [B, 1, S, S].
    """
    length = documents.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & past)[:, None]


def rotary_angles(positions: Tensor, head_size: int, base: float, dtype: torch.dtype) -> Tensor:
    """Angles of RoPE as Megatron's attention takes them.

    Args:
        positions: int64 [B, S].
        head_size: H, even; element i turns together with element i + H / 2.
        base: pair i turns by base^(-2i/H) radians a position.
        dtype: of the model; angles are float32 at least.

    Returns:
        Radians [S, B, 1, H].
    """
    exact = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head_size, 2, device=positions.device).to(exact)
    angles = positions.T.to(exact)[:, :, None, None] / base ** (pairs / head_size)
    return torch.cat([angles, angles], dim=-1)


class NormedSelfAttention(SelfAttention):
    """Self-attention with Chameleon's norms of queries and keys, before the rotation.

    Megatron's own switch sums the gradients of these norms over tensor-parallel ranks, by their
    names; ours are each rank's own, hence the other names.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        size, dtype = self.hidden_size_per_attention_head, self.config.params_dtype
        self.norm_of_q = HeadNorm(self.num_attention_heads_per_partition, size, dtype)
        self.norm_of_k = HeadNorm(self.num_query_groups_per_partition, size, dtype)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Queries, keys and values, [S, B, heads of this rank, H] each."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.norm_of_q(query), self.norm_of_k(key), value


class CausalAttention(nn.Module):
    """Megatron's core-attention slot: softmax(q k^T / sqrt(H)) v, each position seeing its past.

    Serves self-attention and bridges alike: in a bridge key and value come from the other tower,
    and position t sees its positions <= t (the authors' code; eq. 5 omits V, a slip).
    """

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.cache: LayerCache | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *_: Any, **__: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, H].
            key: [S, B, N or a divisor of it, H]; N / theirs query heads read each of its heads.
            value: as the key.
            mask: Places.visible; a cache brings its own.

        Returns:
            [S, B, N*H].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None:
            k, v, mask = self.cache.extend(k, v)
        elif q.dtype is torch.bfloat16 and q.device.type == "cpu":
            # There torch's kernel for the gradient is three times slower in bf16 than in fp32.
            q, k, v = q.float(), k.float(), v.float()
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
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
