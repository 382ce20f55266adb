"""Filling a canvas: tokens come out of the masks, some at a time, until none is left.

Each pass asks the model about the places that are still open, chooses some of them, and draws their tokens. Which
places are chosen depends on the distributions there, never on what would be drawn from them: one place a pass therefore
samples exactly from the model, in whatever order (adaptive orders included), and only more than one approximates.

Tokens are drawn in 64-bit floats at the chosen places; 32-bit Gumbel noise would silently lower the temperature (Zheng
et al. 2024, arXiv:2409.02908). A place's random number is a function of seed, row and place alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from profiling import nvtx
from trainkit.random import Purpose, uniform
from transformerlm.inference.denoising import Denoiser
from transformerlm.inference.sampling import adjusted_log_probs, invert_cumulative
from transformerlm.inference.specs import DEFAULT_DENOISING, DEFAULT_SAMPLING, DenoisingSpec, SamplingSpec
from transformerlm.models.cache import KeyValueCache
from transformerlm.models.visibility import block_causal

View = Callable[[], Tensor]
"""The canvas as it is now, as the model is to see it: int64 [rows, length]."""
Logits = Callable[[Tensor], Tensor]
"""From the places asked about, bool [batch, length of the canvas], to float64 [places, vocab_size]."""
BlockReader = Callable[[int, int], Logits]
"""To be called when a block, from one place to another, is begun."""


@dataclass(frozen=True)
class Step:
    """What one forward pass has decided."""

    number: int
    """From 0."""
    rows: list[int]
    """Of each new token: the row it stands in,"""
    positions: list[int]
    """its place in the canvas,"""
    tokens: list[int]
    """its id,"""
    confidences: list[float]
    """and its probability when it was drawn."""
    canvas: Tensor
    """int64 [batch, length], masks where nothing stands yet; the next step changes it in place."""


def denoise(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    denoising: DenoisingSpec = DEFAULT_DENOISING,
    sampling: SamplingSpec = DEFAULT_SAMPLING,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    stop_id: int | None = None,
) -> Iterator[Step]:
    """Fill the masks of `canvas` (int64 [batch, length], at most the model's context), and tell each step.

    What is no mask stays as it is, wherever it stands; begin the canvas with the end-of-text id, as every document in
    training began. `rows` names each row's random numbers (default 0, 1, …): a row is filled alike in any company. Once
    a `stop_id` has been drawn, what comes after it is left open; it is not drawn where given text follows.
    """
    assert not denoiser.block_size or denoising.block_length in (0, denoiser.block_size)
    canvas = canvas.clone()
    batch, length = canvas.shape
    row_ids = torch.tensor(range(batch) if rows is None else rows, device=canvas.device)
    drawing, waiting = (uniform(seed, Purpose.SAMPLING, row_ids, length, step=step) for step in (0, 1))
    given = canvas != denoiser.mask_id
    never_stops = _before_given_text(given)
    penalizes, unpenalized = (
        sampling.repetition_penalty != 1.0,
        [i for i in (denoiser.mask_id, stop_id) if i is not None],
    )
    total = (~given).sum(dim=1)
    number = 0
    open_block = _open_reader(denoiser, canvas, given, denoising)
    for start, end in _blocks(length, denoising.block_length or denoiser.block_size or length):
        inside = torch.zeros_like(given)
        inside[:, start:end] = True
        if not (_open_places(canvas, denoiser, given, stop_id) & inside).any():
            continue
        read = open_block(start, end)
        steps_left = _allot(denoising, total, given, start, end)
        while (is_open := _open_places(canvas, denoiser, given, stop_id) & inside).any():
            with nvtx.range("denoise"):
                logits = _without_stops(read(is_open), never_stops[is_open], stop_id)
                seen = _seen(canvas, is_open, logits.shape[-1], unpenalized) if penalizes else None
                log_probs = adjusted_log_probs(logits, sampling, seen=seen)
                chosen = choose_places(log_probs, is_open, waiting, denoising, steps_left)
                picked = chosen[is_open]
                tokens = _draw(log_probs[picked], drawing[chosen], sampling)
                canvas[chosen] = tokens
            yield _step(number, chosen, tokens, log_probs[picked], canvas)
            steps_left = (steps_left - 1).clamp(min=1)
            number += 1


def choose_places(
    log_probs: Tensor, is_open: Tensor, waiting: Tensor, spec: DenoisingSpec, steps_left: Tensor
) -> Tensor:
    """Which of the open places (bool [batch, length]) to fill now: at least one of each row that has any.

    `log_probs` float64 [open places, vocab_size] in the order of `is_open`; `waiting` float64 [batch, length], a random
    number in [0, 1) for each place; `steps_left` int64 [batch], among which a row's open places are shared out.
    """
    if spec.order == "first_hitting":
        # A place is filled when noise, running backwards from time 1, passes its number. All that falls into one of the
        # `steps` equal parts of the time is filled in one pass; parts in which nothing falls cost none.
        time = (waiting * spec.steps).floor() if spec.steps else waiting
        time = time.masked_fill(~is_open, -1.0)
        chosen = is_open & (time == time.amax(dim=1, keepdim=True))
    else:
        scores = torch.full(is_open.shape, -math.inf, dtype=torch.float64, device=is_open.device)
        scores[is_open] = _scores(log_probs, is_open, waiting, spec)
        wanted = -(-is_open.sum(dim=1) // steps_left) if spec.steps else spec.tokens_per_step
        ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = is_open & (ranks < torch.as_tensor(wanted, device=is_open.device).reshape(-1, 1))
    if spec.threshold:
        is_sure = torch.zeros_like(is_open)
        is_sure[is_open] = log_probs.amax(dim=-1) >= math.log(spec.threshold)
        chosen |= is_sure
    return chosen


def _scores(log_probs: Tensor, is_open: Tensor, waiting: Tensor, spec: DenoisingSpec) -> Tensor:
    """How early each open place comes, float64 [open places]; the highest first."""
    match spec.order:
        case "confidence":
            return log_probs.amax(dim=-1)
        case "margin":
            first, second = log_probs.exp().topk(2, dim=-1).values.unbind(dim=-1)
            return first - second
        case "entropy":
            probs = log_probs.exp()
            return torch.where(probs > 0, probs * log_probs, 0.0).sum(dim=-1)
        case "random" | "first_hitting":
            return waiting[is_open]
        case "left_to_right":
            return -is_open.nonzero()[:, 1].double()


def _blocks(length: int, block_length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + block_length, length)) for start in range(0, length, block_length))


def _allot(spec: DenoisingSpec, total: Tensor, given: Tensor, start: int, end: int) -> Tensor:
    """How many of its steps each row spends on a block, int64 [batch]: its share of the open places, at least one."""
    before, after = ((~given[:, :column]).sum(dim=1) for column in (start, end))
    total = total.clamp(min=1)
    return (spec.steps * after // total - spec.steps * before // total).clamp(min=1)


def _open_places(canvas: Tensor, denoiser: Denoiser, given: Tensor, stop_id: int | None) -> Tensor:
    """Masks that are still wanted: not those behind an end of text that has been drawn."""
    is_open = canvas == denoiser.mask_id
    if stop_id is not None:
        is_stop = (canvas == stop_id) & ~given
        is_open &= is_stop.cumsum(dim=1) == 0
    return is_open


def _without_stops(logits: Tensor, never_stops: Tensor, stop_id: int | None) -> Tensor:
    """`logits` [open places, vocab_size], the stop impossible where `never_stops` (bool [open places])."""
    if stop_id is None:
        return logits
    is_stop = torch.arange(logits.shape[-1], device=logits.device) == stop_id
    return logits.masked_fill(never_stops.unsqueeze(1) & is_stop, -math.inf)


def _before_given_text(given: Tensor) -> Tensor:
    """bool as `given` [batch, length]: whether given text stands somewhere behind a place."""
    return given.flip(1).cumsum(dim=1).flip(1) > given.long()


def _seen(canvas: Tensor, is_open: Tensor, vocab_size: int, ignored: list[int]) -> Tensor:
    """bool [open places, vocab_size]: the ids that stand in the place's row."""
    seen = torch.zeros(len(canvas), vocab_size, dtype=torch.bool, device=canvas.device)
    seen.scatter_(1, canvas, True)
    seen[:, ignored] = False
    return seen[is_open.nonzero()[:, 0]]


def _draw(log_probs: Tensor, numbers: Tensor, sampling: SamplingSpec) -> Tensor:
    if sampling.temperature == 0:
        return log_probs.argmax(dim=-1)
    return invert_cumulative(log_probs.exp(), numbers.unsqueeze(-1))


def _step(number: int, chosen: Tensor, tokens: Tensor, log_probs: Tensor, canvas: Tensor) -> Step:
    rows, positions = chosen.nonzero(as_tuple=True)
    confidences = log_probs.gather(1, tokens.unsqueeze(1)).exp().squeeze(1)
    return Step(number, rows.tolist(), positions.tolist(), tokens.tolist(), confidences.tolist(), canvas)


def _open_reader(denoiser: Denoiser, canvas: Tensor, given: Tensor, spec: DenoisingSpec) -> BlockReader:
    """How the logits of a block's places are got, whatever is kept from pass to pass."""
    if not spec.guidance:
        return _block_reader(denoiser, lambda: canvas, spec)
    prompt = given.clone()
    prompt[:, 0] = False  # the end-of-text token that begins the document
    return _guided(_block_reader(denoiser, lambda: _with_and_without(canvas, prompt, denoiser), spec), denoiser, spec)


def _block_reader(denoiser: Denoiser, view: View, spec: DenoisingSpec) -> BlockReader:
    if denoiser.block_size:
        return _exactly_cached(denoiser, view)
    if spec.cache == "off":
        return lambda start, end: lambda asked: denoiser.logits(view(), asked)
    return _roughly_cached(denoiser, view, keeps_what_follows=spec.cache == "dual")


def _exactly_cached(denoiser: Denoiser, view: View) -> BlockReader:
    """Keys and values of finished blocks, which no later token can change (arXiv:2503.09573)."""
    cache = _empty_cache(denoiser, view())
    kept = 0

    def open_block(start: int, end: int) -> Logits:
        nonlocal kept
        if kept < start:
            cache.length = kept
            _fill_cache(denoiser, view()[:, kept:start], cache, block_causal(start, denoiser.block_size)[kept:])
            kept = start
        return lambda asked: denoiser.logits_with_cache(view()[:, start:end], asked[:, start:end], cache, start=start)

    return open_block


def _roughly_cached(denoiser: Denoiser, view: View, *, keeps_what_follows: bool) -> BlockReader:
    """Keys and values of what lies outside of a block, as they were when it was begun.

    In a bidirectional model they would change with every token of the block: an approximation, renewed block by block.
    """
    cache = _empty_cache(denoiser, view())
    length = cache.visible = cache.capacity

    def open_block(start: int, end: int) -> Logits:
        first, last = max(start - denoiser.lookback, 0), end if keeps_what_follows else length
        cache.length = 0
        _fill_cache(denoiser, view(), cache, None)
        return lambda asked: denoiser.logits_with_cache(view()[:, first:last], asked[:, first:last], cache, start=first)

    return open_block


def _empty_cache(denoiser: Denoiser, tokens: Tensor) -> KeyValueCache:
    weight = denoiser.model.embedding.weight
    batch_size, capacity = tokens.shape
    return KeyValueCache(
        denoiser.model.spec, batch_size=batch_size, capacity=capacity, device=weight.device, dtype=weight.dtype
    )


@torch.inference_mode()
def _fill_cache(denoiser: Denoiser, tokens: Tensor, cache: KeyValueCache, mask: Tensor | None) -> None:
    mask = None if mask is None else mask.to(tokens.device)
    denoiser.model.forward(tokens, cache=cache, causal=False, mask=mask, readout=lambda hidden, head: None)


def _guided(reader: BlockReader, denoiser: Denoiser, spec: DenoisingSpec) -> BlockReader:
    """Away from what would be written without the prompt (Ho & Salimans 2022, arXiv:2207.12598)."""

    def open_block(start: int, end: int) -> Logits:
        read = reader(start, end)

        def guided(asked: Tensor) -> Tensor:
            prompted, unprompted = read(asked.repeat(2, 1)).chunk(2)
            logits = (1 + spec.guidance) * prompted - spec.guidance * unprompted
            return logits.masked_fill(denoiser.forbidden, -math.inf)  # where infinity minus infinity is no number

        return guided

    return open_block


def _with_and_without(canvas: Tensor, prompt: Tensor, denoiser: Denoiser) -> Tensor:
    return torch.cat([canvas, canvas.masked_fill(prompt, denoiser.mask_id)])
