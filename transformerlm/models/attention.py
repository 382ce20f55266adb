"""Scaled dot-product attention in two backends, and who may look at whom."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.models.specs import AttentionBackend


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    backend: AttentionBackend,
) -> Tensor:
    """softmax(Q Kᵀ / √head_dim) V → [batch, heads, queries, head_dim].

    Queries are [batch, heads, queries, head_dim], keys and values [batch, kv_heads, keys, head_dim], where a group of
    heads / kv_heads query heads shares each of them. `mask` (bool, broadcasts to [batch, heads, queries, keys]) is True
    where a query may look; `is_causal` stands for the lower triangle, without building it. Never both.
    """
    assert mask is None or not is_causal
    match backend:
        case "sdpa":
            grouped = queries.shape[1] != keys.shape[1]
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
            )
        case "eager":
            return _eager_attention(queries, keys, values, mask=mask, is_causal=is_causal)


def _eager_attention(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, is_causal: bool) -> Tensor:
    batch, heads, length, head_dim = queries.shape
    # [batch, kv_heads, group, queries, head_dim]: a group of query heads meets its one key head by broadcasting.
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    scores = grouped @ keys.unsqueeze(2).transpose(-1, -2) / math.sqrt(head_dim)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if is_causal:
        mask = torch.ones(length, keys.shape[2], dtype=torch.bool, device=queries.device).tril()
    if mask is not None:
        # The mask's head dimension is one for all heads, so a second one beside it is for the groups.
        scores = scores.masked_fill(~(mask.unsqueeze(2) if mask.dim() == 4 else mask), -math.inf)
    mixed = scores.softmax(dim=-1).to(values.dtype) @ values.unsqueeze(2)
    return mixed.reshape(batch, heads, length, head_dim)


def attention_mask(
    *,
    length: int,
    start: int,
    visible: Tensor | None,
    causal: bool,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    device: torch.device,
) -> tuple[Tensor | None, bool]:
    """`(mask, is_causal)` for `length` queries at positions start … over keys at positions 0 … start + length - 1.

    `visible` (bool, broadcasts to [batch, 1, queries, keys]) says who may look at whom in place of `causal`.
    Segments (int64 [batch, queries] and [batch, keys]) restrict attention to equal numbers. A mask is built only where
    `is_causal` or no mask at all does not say the same: kernels are fastest without. A query always sees itself, so
    that no row of the softmax is empty.
    """
    if visible is None:
        if query_segments is None or key_segments is None:
            if not causal or length == 1:
                return None, False
            if start == 0:
                return None, True
        visible = _triangle(length, start, device) if causal and length > 1 else None
    if query_segments is None or key_segments is None:
        return visible, False
    is_same = (query_segments.unsqueeze(2) == key_segments.unsqueeze(1)).unsqueeze(1)
    return (is_same if visible is None else is_same & visible), False


def _triangle(length: int, start: int, device: torch.device) -> Tensor:
    """True where a key's position is at most the query's: bool [length, start + length]."""
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(diagonal=start)
