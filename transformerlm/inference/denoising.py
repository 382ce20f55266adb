"""A model read as a denoiser: what it believes about chosen places of a text whose masks are still to be filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformerlm.models.specs import Alignment
from transformerlm.models.transformer import Head, Transformer
from transformerlm.models.visibility import block_causal, denoising_arguments


@dataclass(frozen=True)
class Denoiser:
    """A diffusion model and what must be known in order to read it as it was trained."""

    model: Transformer
    mask_id: int
    forbidden: Tensor
    """bool [vocab_size], on the model's device: ids that are never predicted, the mask among them."""
    alignment: Alignment = "in_place"
    block_size: int = 0
    """0 = every token sees every other."""

    def logits(self, tokens: Tensor, chosen: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """float64 [chosen places, vocab_size], row by row, of `tokens` int64 [batch, length]; −∞ for forbidden ids.

        `chosen` bool [batch, length] are the places asked about; under the shifted alignment never the first.
        `segments` as in the model's `forward`. With blocks, a token sees the earlier ones as they are in `tokens`.
        """
        mask = block_causal(tokens.shape[1], self.block_size, tokens.device) if self.block_size else None
        return self._read(chosen, {"tokens": tokens, "segments": segments, "causal": False, "mask": mask})

    def logits_given_clean(
        self, noisy: Tensor, clean: Tensor, chosen: Tensor, *, segments: Tensor | None = None
    ) -> Tensor:
        """The same for all blocks of `noisy` at once, each of which sees the blocks before it as in `clean`."""
        arguments = denoising_arguments(noisy, clean, block_size=self.block_size, segments=segments)
        return self._read(chosen, arguments)

    @torch.no_grad()
    def _read(self, chosen: Tensor, arguments: dict[str, Any]) -> Tensor:
        rows, columns = chosen.nonzero(as_tuple=True)
        if self.alignment == "shifted":
            columns = columns - 1

        def read(hidden: Tensor, head: Head) -> Tensor:
            return head(hidden[rows, columns])

        # `forward` itself passes by `torch.compile`: shapes change at every call.
        logits = self.model.forward(**arguments, readout=read)
        return logits.double().masked_fill(self.forbidden, -torch.inf)
