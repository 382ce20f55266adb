"""How far a next-token model agrees with a draft."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transformerlm.inference.denoising import Places
from transformerlm.models.transformer import Head, Transformer


@torch.inference_mode()
def agreed_places(
    judge: Transformer, drafted: Tensor, places: Places, *, threshold: float, forbidden: Tensor
) -> Tensor:
    """bool [places]: of each row those before the first draft that `judge` doubts, and the first place in any case.

    One causal pass over `drafted` (int64 [batch, length]) tells the probability of every draft given all before it, the
    drafts among them; below `threshold` it is doubted. `places` are those that were drafted, none of them the first of
    a text; what stands between them is not asked about. As in Israel et al. 2025 (arXiv:2506.00413), with a threshold
    for their product of distributions: what is committed depends on what was drawn, an approximation.
    """
    rows, columns = places

    def read(hidden: Tensor, head: Head) -> Tensor:
        return head(hidden[rows, columns - 1])

    logits = judge.forward(drafted, readout=read).double().masked_fill_(forbidden, -math.inf)
    log_probs = logits.log_softmax(dim=-1).gather(1, drafted[rows, columns].unsqueeze(1)).squeeze(1)
    is_draft, is_doubted = torch.zeros_like(drafted), torch.zeros_like(drafted)
    is_draft[rows, columns] = 1
    is_doubted[rows, columns] = (log_probs < math.log(threshold)).long()
    is_first, is_agreed = is_draft.cumsum(dim=1) == 1, is_doubted.cumsum(dim=1) == 0
    return (is_first | is_agreed)[rows, columns]
