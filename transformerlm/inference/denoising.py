"""A model read as a denoiser: what it believes about chosen places of a text whose masks are still to be filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformerlm.models.cache import KeyValueCache
from transformerlm.models.specs import Alignment
from transformerlm.models.transformer import Head, Transformer
from transformerlm.models.visibility import block_causal, denoising_arguments, masked_share

Places = tuple[Tensor, Tensor]
"""Rows and columns of places in a batch of texts, int64 [places] each, on the model's device."""


@dataclass(frozen=True)
class Denoiser:
    """A diffusion model and what must be known in order to read it as it was trained.

    Logits are float64 [places, vocab_size], −∞ for forbidden ids: of the places in the order in which they are named,
    or row by row where `chosen`, bool [batch, length], marks them. Under the shifted alignment never of the first.
    """

    model: Transformer
    mask_id: int
    forbidden: Tensor
    """bool [vocab_size], on the model's device: ids that are never predicted, the mask among them."""
    alignment: Alignment = "in_place"
    block_size: int = 0
    """0 = every token sees every other."""

    @property
    def lookback(self) -> int:
        """How many places before a token the logits about it are found."""
        return int(self.alignment == "shifted")

    def logits(self, tokens: Tensor, chosen: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """Of `tokens` int64 [batch, length]; `segments` as in the model's `forward`."""
        return self.logits_at(tokens, _marked(chosen), segments=segments)

    def logits_at(self, tokens: Tensor, places: Places, *, segments: Tensor | None = None) -> Tensor:
        """The same of named places: nothing has to be asked from the device."""
        mask = block_causal(tokens.shape[1], self.block_size, tokens.device) if self.block_size else None
        level = self.noise_level(tokens)
        arguments = {"tokens": tokens, "segments": segments, "causal": False, "mask": mask, "noise_level": level}
        return self._read(places, arguments)

    def logits_given_clean(
        self, noisy: Tensor, clean: Tensor, chosen: Tensor, *, segments: Tensor | None = None
    ) -> Tensor:
        """The same for all blocks of `noisy` at once, each of which sees the blocks before it as in `clean`."""
        arguments = denoising_arguments(
            noisy, clean, mask_id=self.mask_id, block_size=self.block_size, segments=segments
        )
        return self._read(_marked(chosen), arguments)

    def logits_with_cache(
        self, tokens: Tensor, places: Places, cache: KeyValueCache, *, start: int, noise_level: Tensor
    ) -> Tensor:
        """Of `places` in `tokens`, which stand at `start` of a longer text; `cache` has keys and values of the rest.

        `noise_level` [batch, length] is of the longer text. What the cache held from `start` on is overwritten.
        """
        cache.length = start
        return self._read(places, {"tokens": tokens, "cache": cache, "causal": False, "noise_level": noise_level})

    def noise_level(self, tokens: Tensor) -> Tensor:
        """What a model with `noise_embedding` is told about whole texts, or whole blocks of a block model."""
        return masked_share(tokens, self.mask_id, self.block_size)

    @torch.inference_mode()
    def _read(self, places: Places, arguments: dict[str, Any]) -> Tensor:
        rows, columns = places[0], places[1] - self.lookback

        def read(hidden: Tensor, head: Head) -> Tensor:
            return head(hidden[rows, columns])

        # `forward` itself passes by `torch.compile`: shapes change at every call.
        logits = self.model.forward(**arguments, readout=read)
        return logits.double().masked_fill_(self.forbidden, -torch.inf)


def _marked(chosen: Tensor) -> Places:
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows, columns
