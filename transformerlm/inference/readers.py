"""How a denoiser is read while a canvas is filled: from scratch, or with keys and values that were kept.

A `Reader` is told when a block is begun, and answers about places of the canvas until the next one is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from profiling import nvtx
from transformerlm.inference.denoising import Denoiser, Places
from transformerlm.inference.specs import DenoisingSpec
from transformerlm.models.cache import KeyValueCache
from transformerlm.models.visibility import block_causal

View = Callable[[], Tensor]
"""The canvas as it is now, as the model is to see it: int64 [rows, length]."""
Logits = Callable[[Places], Tensor]
"""From the places asked about to logits [places, vocab_size], at least float32."""


class Block(NamedTuple):
    """Places start … end - 1, which are filled before any later one."""

    first: int
    """Where the model begins to see: 0 until the canvas has outgrown its context."""
    start: int
    end: int


Reader = Callable[[Block], Logits]


def cut_blocks(length: int, block_length: int, context_length: int) -> Iterator[Block]:
    """The blocks of a canvas in their order; whenever the context is full, half of it is kept and the rest forgotten.

    The half is one of whole blocks, so that blocks stay where they would be in a text that begins there.
    """
    first = 0
    for start in range(0, length, block_length):
        end = min(start + block_length, length)
        if end - first > context_length:
            first = start - context_length // 2 // block_length * block_length
        yield Block(first, start, end)


def create_reader(denoiser: Denoiser, canvas: Tensor, given: Tensor, spec: DenoisingSpec) -> Reader:
    """For `canvas`, int64 [batch, length], which changes in place; `given` bool alike marks what was there before."""
    if not spec.guidance:
        return _reader(denoiser, lambda: canvas, spec)
    prompt = given.clone()
    prompt[:, 0] = False  # the end-of-text token that begins the document
    both = _reader(denoiser, lambda: torch.cat([canvas, canvas.masked_fill(prompt, denoiser.mask_id)]), spec)
    return _guided(both, denoiser, spec.guidance, len(canvas))


def _reader(denoiser: Denoiser, view: View, spec: DenoisingSpec) -> Reader:
    if denoiser.block_size:
        return _exactly_cached(denoiser, view)
    if spec.cache == "off":
        return lambda block: lambda places: denoiser.logits_at(view(), places)
    return _roughly_cached(denoiser, view, keeps_what_follows=spec.cache == "dual")


def _exactly_cached(denoiser: Denoiser, view: View) -> Reader:
    """Keys and values of finished blocks, which no later token can change (arXiv:2503.09573).

    They do change when the model's context moves on: what is kept of the text is then read anew.
    """
    cache = _empty_cache(denoiser, view())
    first = kept = 0

    def open_block(block: Block) -> Logits:
        nonlocal first, kept
        if first != block.first:
            first = kept = block.first
        if kept < block.start:
            cache.length = kept - first
            mask = block_causal(block.start - first, denoiser.block_size)[kept - first :]
            _fill_cache(denoiser, view()[:, kept : block.start], cache, mask)
            kept = block.start

        def read(places: Places) -> Tensor:
            tokens, start = view()[:, block.start : block.end], block.start - first
            level = denoiser.noise_level(tokens)
            return denoiser.logits_with_cache(
                tokens, _moved(places, -block.start), cache, start=start, noise_level=level
            )

        return read

    return open_block


def _roughly_cached(denoiser: Denoiser, view: View, *, keeps_what_follows: bool) -> Reader:
    """Keys and values of what lies outside of a block, as they were when it was begun.

    In a bidirectional model they would change with every token of the block: an approximation, renewed block by block.
    """
    cache = _empty_cache(denoiser, view())
    length = cache.visible = cache.capacity

    def open_block(block: Block) -> Logits:
        first, last = max(block.start - denoiser.lookback, 0), block.end if keeps_what_follows else length
        cache.length = 0
        _fill_cache(denoiser, view(), cache, None)

        def read(places: Places) -> Tensor:
            text = view()
            level = denoiser.noise_level(text)[:, first:last]  # as without a cache: of the whole canvas
            return denoiser.logits_with_cache(
                text[:, first:last], _moved(places, -first), cache, start=first, noise_level=level
            )

        return read

    return open_block


def _guided(reader: Reader, denoiser: Denoiser, strength: float, batch_size: int) -> Reader:
    """Away from what would be written without the prompt (Ho & Salimans 2022, arXiv:2207.12598).

    `reader` sees each text twice, with its prompt and, `batch_size` rows below, without.
    """

    def open_block(block: Block) -> Logits:
        read = reader(block)

        def guided(places: Places) -> Tensor:
            rows, columns = places
            prompted, unprompted = read((torch.cat([rows, rows + batch_size]), columns.repeat(2))).chunk(2)
            logits = (1 + strength) * prompted - strength * unprompted
            return logits.masked_fill(denoiser.forbidden, -math.inf)  # where infinity minus infinity is no number

        return guided

    return open_block


def _moved(places: Places, by: int) -> Places:
    return places[0], places[1] + by


def _empty_cache(denoiser: Denoiser, tokens: Tensor) -> KeyValueCache:
    weight, spec = denoiser.model.embedding.weight, denoiser.model.spec
    capacity = min(tokens.shape[1], spec.context_length)
    return KeyValueCache(spec, batch_size=len(tokens), capacity=capacity, device=weight.device, dtype=weight.dtype)


@torch.inference_mode()
def _fill_cache(denoiser: Denoiser, tokens: Tensor, cache: KeyValueCache, mask: Tensor | None) -> None:
    mask, level = None if mask is None else mask.to(tokens.device), denoiser.noise_level(tokens)
    with nvtx.range("prefill"):
        denoiser.model.forward(
            tokens, cache=cache, causal=False, mask=mask, noise_level=level, readout=lambda hidden, head: None
        )
