"""Filling a canvas: tokens come out of the masks, some at a time, until none is left.

Each pass asks the model about the places that are still open, chooses some of them, and draws their tokens. Which
places are chosen depends on the distributions there, never on what would be drawn from them: one place a pass therefore
samples exactly from the model, in whatever order (adaptive orders included), and only more than one approximates. So
does `agreement`, which looks at what was drawn.

Places are chosen in the type of the logits. Tokens are drawn in 64-bit floats, at the chosen places alone (with
`agreement` at all that are open); 32-bit Gumbel noise would silently lower the temperature (Zheng et al. 2024,
arXiv:2409.02908). A place's random number is a function of seed, row and place alone.

The host has a copy of the canvas and knows by itself what is open: a pass waits for the device twice, for the places
that it has chosen and for their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from profiling import nvtx
from trainkit.random import Purpose, uniform
from transformerlm.inference.agreement import agreed_places
from transformerlm.inference.denoising import Denoiser, Places
from transformerlm.inference.readers import Block, create_reader, cut_blocks
from transformerlm.inference.sampling import adjusted_log_probs, invert_cumulative
from transformerlm.inference.specs import DEFAULT_DENOISING, DEFAULT_SAMPLING, DenoisingSpec, SamplingSpec
from transformerlm.models.transformer import Transformer


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
    """int64 [batch, length] on the CPU, masks where nothing stands yet; the next step changes it in place."""


def denoise(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    denoising: DenoisingSpec = DEFAULT_DENOISING,
    sampling: SamplingSpec = DEFAULT_SAMPLING,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    stop_id: int | None = None,
    judge: Transformer | None = None,
) -> Iterator[Step]:
    """Fill the masks of `canvas` (int64 [batch, length]), and tell each step.

    What is no mask stays as it is, wherever it stands; begin the canvas with the end-of-text id, as every document in
    training began. `rows` names each row's random numbers (default 0, 1, …): a row is filled alike in any company. Once
    a `stop_id` has been drawn, what comes after it is left open; it is not drawn where given text follows. `judge` is
    the next-token model whose agreement `denoising` asks for. A model with blocks of at most half of its context takes
    a canvas of any length; `cut_blocks` says what it sees of it.
    """
    context_length, own_block = denoiser.model.spec.context_length, denoiser.block_size
    assert not own_block or denoising.block_length in (0, own_block)
    assert canvas.shape[1] <= context_length or 0 < 2 * own_block <= context_length
    assert bool(denoising.agreement) == (judge is not None)
    text, canvas = canvas.to("cpu", copy=True), canvas.clone()
    device, (batch, length) = canvas.device, text.shape
    row_ids = torch.tensor(range(batch) if rows is None else rows, device=device)
    drawing, waiting = (uniform(seed, Purpose.SAMPLING, row_ids, length, step=step) for step in (0, 1))
    given = text != denoiser.mask_id
    never_stops = _before_given_text(given).to(device)
    unpenalized = [i for i in (denoiser.mask_id, stop_id) if i is not None]
    penalizes = sampling.repetition_penalty != 1.0
    open_block = create_reader(denoiser, canvas, given.to(device), denoising)
    number = 0
    for block in cut_blocks(length, denoising.block_length or own_block or length, context_length):
        if not _open_places(text, denoiser, given, stop_id, block).any():
            continue
        read = open_block(block)
        steps_left = _allot(denoising, given, block)
        clock = _clock(waiting, denoising, steps_left)
        while (is_open := _open_places(text, denoiser, given, stop_id, block)).any():
            with nvtx.range("denoise"):
                places, wanted = _on_device(is_open, _wanted(is_open, denoising, steps_left), device)
                logits = read(places)
                with nvtx.range("draw", "fine"):
                    if stop_id is not None:
                        logits = _without_stops(logits, never_stops[places], stop_id)
                    seen = _seen(canvas, places, logits.shape[-1], unpenalized) if penalizes else None
                    draw = partial(_draw, logits, drawing[places], sampling, seen)
                    if judge is None:
                        believe = cache(partial(adjusted_log_probs, logits, sampling, seen=seen))
                        drawn = draw(choose_places(believe, places, clock, wanted, denoising).nonzero().squeeze(1))
                    else:
                        drafts = draw(torch.arange(len(logits), device=device))
                        drafted = canvas.index_put(places, drafts.tokens)
                        drawn = drafts.only(_agreed(judge, drafted, places, block, denoiser, denoising))
                canvas[places[0][drawn.chosen], places[1][drawn.chosen]] = drawn.tokens
                step = _step(number, is_open, drawn, text)
            yield step
            steps_left = (steps_left - 1).clamp(min=1)
            number += 1


def choose_places(
    believe: Callable[[], Tensor], places: Places, waiting: Tensor, wanted: Tensor, spec: DenoisingSpec
) -> Tensor:
    """Which of the open places to fill now, bool [places]: at least one of each row that has any.

    `believe` returns log-probabilities, [places, vocab_size], and is asked where the choice depends on them; `waiting`
    float64 [batch, length], a random number for each place of the canvas, the highest first; `wanted` int64 [batch],
    how many of a row to fill.
    """
    rows, _ = places
    if spec.order == "first_hitting":
        # A place is filled when noise, running backwards from time 1, passes its number.
        latest = torch.full_like(waiting, -1.0).index_put(places, waiting[places]).amax(dim=1)
        chosen = waiting[places] == latest[rows]
    else:
        scores = _scores(believe, places, waiting, spec).to(waiting.dtype)
        scores = torch.full_like(waiting, -math.inf).index_put(places, scores)
        ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = ranks[places] < wanted[rows]
    if spec.threshold:
        chosen |= believe().amax(dim=-1) >= math.log(spec.threshold)
    return chosen


def _scores(believe: Callable[[], Tensor], places: Places, waiting: Tensor, spec: DenoisingSpec) -> Tensor:
    """How early each open place comes, float [places]; the highest first."""
    match spec.order:
        case "confidence":
            return believe().amax(dim=-1)
        case "margin":
            first, second = believe().exp().topk(2, dim=-1).values.unbind(dim=-1)
            return first - second
        case "entropy":
            log_probs = believe()
            probs = log_probs.exp()
            return torch.where(probs > 0, probs * log_probs, 0.0).sum(dim=-1)
        case "random" | "first_hitting":
            return waiting[places]
        case "left_to_right":
            return -places[1].double()


def _agreed(
    judge: Transformer, drafted: Tensor, places: Places, block: Block, denoiser: Denoiser, spec: DenoisingSpec
) -> Tensor:
    """bool [places]: the drafts that `judge`, which sees what the denoiser sees up to the block's end, agrees with."""
    rows, columns = places
    return agreed_places(
        judge,
        drafted[:, block.first : block.end],
        (rows, columns - block.first),
        threshold=spec.agreement,
        forbidden=denoiser.forbidden,
    )


def _allot(spec: DenoisingSpec, given: Tensor, block: Block) -> Tensor:
    """How many of its steps each row spends on a block, int64 [batch]: its share of the open places, at least one."""
    if spec.steps == "off":
        return torch.ones(len(given), dtype=torch.long)
    before, after, total = ((~given[:, :column]).sum(dim=1) for column in (block.start, block.end, given.shape[1]))
    total = total.clamp(min=1)
    return (spec.steps * after // total - spec.steps * before // total).clamp(min=1)


def _clock(waiting: Tensor, spec: DenoisingSpec, steps: Tensor) -> Tensor:
    """`waiting` for `choose_places`; for first hitting in `steps` (int64 [batch]) equal parts of the time.

    All that falls into one part is filled in one pass; parts in which nothing falls cost none.
    """
    if spec.order != "first_hitting" or spec.steps == "off":
        return waiting
    return (waiting * steps.to(waiting.device, non_blocking=True).unsqueeze(1)).floor()


def _wanted(is_open: Tensor, spec: DenoisingSpec, steps_left: Tensor) -> Tensor:
    """How many places of each row to fill, int64 [batch]: those that are open shared out among its steps."""
    counts = is_open.sum(dim=1)
    return torch.full_like(counts, spec.tokens_per_step) if spec.steps == "off" else -(-counts // steps_left)


def _open_places(text: Tensor, denoiser: Denoiser, given: Tensor, stop_id: int | None, block: Block) -> Tensor:
    """The block's masks that are still wanted, bool as `text`: not those behind an end of text that has been drawn."""
    is_open = text == denoiser.mask_id
    is_open[:, : block.start] = is_open[:, block.end :] = False
    if stop_id is not None:
        is_stop = (text == stop_id) & ~given
        is_open &= is_stop.cumsum(dim=1) == 0
    return is_open


def _on_device(is_open: Tensor, wanted: Tensor, device: torch.device) -> tuple[Places, Tensor]:
    """The open places and `wanted`, sent off at once: a copy that blocks would wait for the device."""
    rows, columns, wanted = (x.to(device, non_blocking=True) for x in (*is_open.nonzero(as_tuple=True), wanted))
    return (rows, columns), wanted


def _without_stops(logits: Tensor, never_stops: Tensor, stop_id: int) -> Tensor:
    """`logits` [places, vocab_size], the stop impossible where `never_stops` (bool [places])."""
    is_stop = torch.arange(logits.shape[-1], device=logits.device) == stop_id
    return logits.masked_fill(never_stops.unsqueeze(1) & is_stop, -math.inf)


def _before_given_text(given: Tensor) -> Tensor:
    """bool as `given` [batch, length]: whether given text stands somewhere behind a place."""
    return given.flip(1).cumsum(dim=1).flip(1) > given.long()


def _seen(canvas: Tensor, places: Places, vocab_size: int, ignored: list[int]) -> Tensor:
    """bool [places, vocab_size]: the ids that stand in the place's row."""
    seen = torch.zeros(len(canvas), vocab_size, dtype=torch.bool, device=canvas.device)
    seen.scatter_(1, canvas, True)
    seen[:, ignored] = False
    return seen[places[0]]


@dataclass(frozen=True)
class _Drawn:
    """Some of the open places, and what was drawn there: [drawn] each, on the device."""

    chosen: Tensor
    """int64, which of the open places."""
    tokens: Tensor
    confidences: Tensor

    def only(self, wanted: Tensor) -> _Drawn:
        """Those that `wanted`, bool [drawn], marks."""
        kept = wanted.nonzero().squeeze(1)
        return _Drawn(self.chosen[kept], self.tokens[kept], self.confidences[kept])


def _draw(logits: Tensor, numbers: Tensor, sampling: SamplingSpec, seen: Tensor | None, chosen: Tensor) -> _Drawn:
    """`logits`, `numbers` (float64) and `seen` of all open places; `chosen` int64, which of them to draw for."""
    log_probs = adjusted_log_probs(logits[chosen].double(), sampling, seen=None if seen is None else seen[chosen])
    if sampling.temperature == 0:
        tokens = log_probs.argmax(dim=-1)
    else:
        tokens = invert_cumulative(log_probs.exp(), numbers[chosen].unsqueeze(-1))
    return _Drawn(chosen, tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1).exp())


def _step(number: int, is_open: Tensor, drawn: _Drawn, text: Tensor) -> Step:
    """Fetch what was drawn, in one piece, and write it into the host's `text`."""
    chosen, tokens, confidences = torch.stack([drawn.chosen.double(), drawn.tokens.double(), drawn.confidences]).cpu()
    rows, columns = is_open.nonzero()[chosen.long()].unbind(dim=1)
    text[rows, columns] = tokens.long()
    return Step(number, rows.tolist(), columns.tolist(), tokens.long().tolist(), confidences.tolist(), text)
