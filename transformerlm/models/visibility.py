"""Who sees whom in block diffusion (Arriola et al. 2025, arXiv:2503.09573), as boolean masks [queries, keys].

Text is cut into blocks. Inside a block every token sees every other; across blocks a token sees only earlier ones. A
model trained on it writes block after block, and keys and values of a finished block never change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def block_causal(length: int, block_size: int, device: torch.device | None = None) -> Tensor:
    """For one sequence: a token sees its own block and those before. One block of the whole length sees all."""
    block = torch.arange(length, device=device) // block_size
    return block.unsqueeze(1) >= block


def noisy_and_clean(length: int, block_size: int, device: torch.device | None = None) -> Tensor:
    """For a noisy copy of the window followed by a clean one, bool [2 · length, 2 · length].

    A noisy block sees itself and the *clean* blocks before it; a clean block sees itself and the clean blocks before.
    One forward pass then predicts every block from an unspoilt past, as generation will see it.
    """
    block = torch.arange(length, device=device) // block_size
    same, earlier = block.unsqueeze(1) == block, block.unsqueeze(1) > block
    noisy = torch.cat([same, earlier], dim=1)
    clean = torch.cat([torch.zeros_like(same), same | earlier], dim=1)
    return torch.cat([noisy, clean])


def masked_share(tokens: Tensor, mask_id: int, block_size: int) -> Tensor:
    """Of each token's block (0 = of all), float32 as `tokens` [batch, length].

    A function of the text alone, unlike the time of a noise process. A model that is told it remains one that has an
    opinion about every order, and its bound an average over them.
    """
    is_mask, length = (tokens == mask_id).float(), tokens.shape[1]
    if not block_size:
        return is_mask.mean(dim=1, keepdim=True).expand(-1, length)
    block = (torch.arange(length, device=tokens.device) // block_size).expand_as(tokens)
    counts = [
        is_mask.new_zeros(len(tokens), -(-length // block_size)).scatter_add(1, block, values)
        for values in (is_mask, torch.ones_like(is_mask))
    ]
    return (counts[0] / counts[1]).gather(1, block)


def denoising_arguments(
    noisy: Tensor, clean: Tensor, *, mask_id: int, block_size: int, segments: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of the model's `forward` that restore `noisy` (int64 [batch, length]); hidden states beyond `length`
    are of the clean copy. `clean` is looked at with blocks only; `segments` as in `forward`."""
    level = masked_share(noisy, mask_id, block_size)
    if not block_size:
        return {"tokens": noisy, "segments": segments, "causal": False, "noise_level": level}
    length = noisy.shape[1]
    return {
        "tokens": torch.cat([noisy, clean], dim=1),
        "segments": None if segments is None else segments.repeat(1, 2),
        "positions": torch.arange(length, device=noisy.device).repeat(2),
        "mask": noisy_and_clean(length, block_size, noisy.device),
        "noise_level": torch.cat([level, torch.zeros_like(level)], dim=1),
    }
