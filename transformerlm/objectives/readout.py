"""Sums over the logits of a batch, with no more of them in memory at one time than asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transformerlm.models.transformer import Head

Terms = Callable[..., Tensor]
"""Sums over rows: `terms(logits [rows, vocab_size], targets [rows], …)` → [number of terms]."""

IGNORED = -100
"""A target that counts nothing."""


def sum_terms(terms: Terms, hidden: Tensor, head: Head, *targets: Tensor, chunk_size: int) -> Tensor:
    """`terms` over all rows of `hidden` [..., d_model] and all `targets` [...], `chunk_size` at a time (0 = all).

    The logits of a chunk are dropped after use and computed again in the backward pass: one third more work for the
    head, and memory that does not grow with the batch.
    """

    def chunk_terms(rows: Tensor, *wanted: Tensor) -> Tensor:
        return terms(head(rows), *wanted)

    columns = [hidden.flatten(0, -2), *(target.flatten() for target in targets)]
    if not chunk_size or chunk_size >= len(columns[0]):
        return chunk_terms(*columns)
    chunks = zip(*(column.split(chunk_size) for column in columns), strict=True)
    parts = [checkpoint(chunk_terms, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(parts).sum(dim=0)
