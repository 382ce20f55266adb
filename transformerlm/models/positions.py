"""Positions that begin anew with each document."""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(segments: Tensor) -> Tensor:
    """How many tokens before it each token has in its own segment: int64 [batch, length], as `segments`.

    Segments are runs of equal numbers. Rotary embeddings do not need this: inside a segment the distances are the same.
    Positions that are looked up in a table do, and the longest document, not the window, is then what must fit.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - index.where(begins, 0).cummax(dim=1).values
