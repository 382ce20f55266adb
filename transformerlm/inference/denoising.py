"""A model read as a denoiser: what it believes about chosen places of a text whose masks are still to be filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformerlm.models.cache import KeyValueCache
from transformerlm.models.specs import Alignment
from transformerlm.models.transformer import Head, Transformer
from transformerlm.models.visibility import block_causal, denoising_arguments, masked_share

Places = tuple[Tensor, Tensor]
"""Rows and columns of places in a batch of texts, int64 [places] each, on the model's device."""

Readout = Callable[[Tensor, Head], Tensor]
"""From the hidden states of places, [places, d_model], to what is wanted of them."""

PIECE = 1024
"""Places whose logits are in memory at one time where no logits are asked for."""


@dataclass(frozen=True)
class Denoiser:
    """A diffusion model and what must be known in order to read it as it was trained.

    Logits are at least float32 [places, vocab_size], −∞ for forbidden ids: of the places in the order in which they are
    named, or row by row where `chosen`, bool [batch, length], marks them. Under the shifted alignment never of the
    first.
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
        return self._read(places, self._arguments(tokens, segments), self._logits)

    def logits_with_cache(
        self, tokens: Tensor, places: Places, cache: KeyValueCache, *, start: int, noise_level: Tensor
    ) -> Tensor:
        """Of `places` in `tokens`, which stand at `start` of a longer text; `cache` has keys and values of the rest.

        `noise_level` [batch, length] is of the longer text. What the cache held from `start` on is overwritten.
        """
        cache.length = start
        arguments = {"tokens": tokens, "cache": cache, "causal": False, "noise_level": noise_level}
        return self._read(places, arguments, self._logits)

    def nats(self, noisy: Tensor, clean: Tensor, chosen: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """−log p of the chosen tokens of `clean`, which `noisy` hides: float64 [places]. Logits come in pieces."""
        return self._read(_marked(chosen), self._arguments(noisy, segments), self._nats_of(clean[chosen]))

    def nats_given_clean(
        self, noisy: Tensor, clean: Tensor, chosen: Tensor, *, segments: Tensor | None = None
    ) -> Tensor:
        """The same for all blocks of `noisy` at once, each of which sees the blocks before it as in `clean`."""
        arguments = denoising_arguments(
            noisy, clean, mask_id=self.mask_id, block_size=self.block_size, segments=segments
        )
        return self._read(_marked(chosen), arguments, self._nats_of(clean[chosen]))

    def noise_level(self, tokens: Tensor) -> Tensor:
        """What a model with `noise_embedding` is told about whole texts, or whole blocks of a block model."""
        return masked_share(tokens, self.mask_id, self.block_size)

    def _arguments(self, tokens: Tensor, segments: Tensor | None) -> dict[str, Any]:
        mask = block_causal(tokens.shape[1], self.block_size, tokens.device) if self.block_size else None
        level = self.noise_level(tokens)
        return {"tokens": tokens, "segments": segments, "causal": False, "mask": mask, "noise_level": level}

    @torch.inference_mode()
    def _read(self, places: Places, arguments: dict[str, Any], use: Readout) -> Tensor:
        rows, columns = places[0], places[1] - self.lookback
        # `forward` itself passes by `torch.compile`: shapes change at every call.
        return self.model.forward(**arguments, readout=lambda hidden, head: use(hidden[rows, columns], head))

    def _logits(self, hidden: Tensor, head: Head) -> Tensor:
        return head(hidden).masked_fill_(self.forbidden, -torch.inf)

    def _nats_of(self, targets: Tensor) -> Readout:
        def nats(hidden: Tensor, head: Head) -> Tensor:
            pieces = zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
            return torch.cat(
                [F.cross_entropy(self._logits(part, head).double(), ids, reduction="none") for part, ids in pieces]
            )

        return nats


def _marked(chosen: Tensor) -> Places:
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows, columns
