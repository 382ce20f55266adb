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


def denoising_arguments(
    noisy: Tensor, clean: Tensor, *, block_size: int, segments: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of the model's `forward` that restore `noisy` (int64 [batch, length]); hidden states beyond `length`
    are of the clean copy. `clean` is looked at with blocks only; `segments` as in `forward`."""
    if not block_size:
        return {"tokens": noisy, "segments": segments, "causal": False}
    length = noisy.shape[1]
    return {
        "tokens": torch.cat([noisy, clean], dim=1),
        "segments": None if segments is None else segments.repeat(1, 2),
        "positions": torch.arange(length, device=noisy.device).repeat(2),
        "mask": noisy_and_clean(length, block_size, noisy.device),
    }
