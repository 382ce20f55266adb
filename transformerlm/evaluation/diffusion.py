"""How likely a diffusion model finds a set of documents: an upper bound on −log p, estimated, and one order, exactly.

The documents are one stream, an end-of-text token before the first, cut into windows that begin with the last token of
the window before, which is given; every other token is scored once. Attention does not stop where a document does, so
that nothing says how long one is (docs/decisions/005); a token's nats count for the document that it lies in.

A masked-diffusion model without time conditioning has an opinion about every order in which a text may be uncovered.
Its bound is the average over all of them (Ou et al. 2024, arXiv:2406.03736); `score_left_to_right` is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from profiling import nvtx
from trainkit.random import Purpose, uniform
from transformerlm.evaluation.likelihood import Scores
from transformerlm.inference.denoising import Denoiser

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Window:
    """`length` tokens of the stream; the first is given."""

    index: int
    tokens: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    """Which document each token lies in; −1 = fill, after the end of the stream."""

    @property
    def eligible(self) -> BoolArray:
        result = self.documents >= 0
        result[0] = False
        return result


@dataclass(frozen=True)
class Draw:
    """One noisy version of a window."""

    masked: BoolArray
    weight: FloatArray
    """What a masked token's nats count, [length]."""


@dataclass(frozen=True)
class Bound:
    """An estimate of the negative evidence lower bound."""

    scores: Scores
    standard_error: float
    """Of the total nats, from the random draws alone."""


def score_bound(
    denoiser: Denoiser,
    documents: Iterable[IntArray],
    byte_lengths: npt.NDArray[np.int64],
    *,
    eot_id: int,
    context_length: int,
    draws: int = 8,
    replicates: int = 2,
    fixed_count: bool = True,
    seed: int = 0,
    batch_size: int = 16,
) -> Bound:
    """Estimate the bound of each document (ids, the final end-of-text included).

    A window is masked `draws` times, the noise levels stratified over them, and all that `replicates` times, which
    tells the error. `fixed_count` draws how *many* tokens are masked, and weighs by that: the same mean, less variance
    (Nie et al. 2025, arXiv:2502.09992); otherwise each token is masked on its own. The numbers of a window depend on
    the seed and its place in the stream alone.
    """
    assert draws >= 1 and replicates >= 2
    sums = _Sums(byte_lengths, eot_id)
    corrupt = _fixed_count_draws if fixed_count else _independent_draws
    variance = 0.0
    for window in cut_windows(sums.measured(documents), context_length, eot_id):
        estimates = np.zeros(replicates)
        for replicate in range(replicates):
            noise = list(corrupt(seed, window, window.index * replicates + replicate, draws, denoiser.block_size))
            nats = _weighted_nats(denoiser, window, noise, batch_size) / draws
            sums.add(window, nats / replicates)
            estimates[replicate] = nats.sum()
        variance += float(estimates.var(ddof=1)) / replicates
    return Bound(sums.scores(), math.sqrt(variance))


def score_left_to_right(
    denoiser: Denoiser,
    documents: Iterable[IntArray],
    byte_lengths: npt.NDArray[np.int64],
    *,
    eot_id: int,
    context_length: int,
    batch_size: int = 16,
) -> Scores:
    """−log p by the chain rule, each token predicted from those before it and masks after: exact, a pass a token."""
    sums = _Sums(byte_lengths, eot_id)
    for window in cut_windows(sums.measured(documents), context_length, eot_id):
        places = np.flatnonzero(window.eligible)
        hidden = window.eligible & (np.arange(context_length) >= places[:, None])
        asked = np.arange(context_length) == places[:, None]
        for start in range(0, len(places), batch_size):
            rows = slice(start, start + batch_size)
            nats = _nats(denoiser, window, hidden[rows], asked[rows], given_clean=False)
            sums.add(window, nats.sum(axis=0))
    return sums.scores()


def cut_windows(documents: Iterable[IntArray], context_length: int, eot_id: int) -> Iterator[Window]:
    """Windows of `context_length` tokens that share one token each; the last one is filled up."""
    stream = _tokens_with_documents(documents, eot_id)
    carried = next(stream)
    index = 0
    while rest := list(islice(stream, context_length - 1)):
        tokens, owners = (np.array(column, np.int64) for column in zip(carried, *rest, strict=True))
        fill = context_length - len(tokens)
        yield Window(
            index, np.pad(tokens, (0, fill), constant_values=eot_id), np.pad(owners, (0, fill), constant_values=-1)
        )
        carried, index = rest[-1], index + 1


def _tokens_with_documents(documents: Iterable[IntArray], eot_id: int) -> Iterator[tuple[int, int]]:
    """Each token of the stream and the number of its document; the first end-of-text token counts as document 0's."""
    yield eot_id, 0
    for number, document in enumerate(documents):
        for token in document.tolist():
            yield token, number


def _independent_draws(seed: int, window: Window, row: int, draws: int, block_size: int) -> Iterator[Draw]:
    """Each eligible token masked with probability t, weight 1/t; t from a stratum of its own in every draw."""
    eligible, block = window.eligible, _block_numbers(window, block_size)
    times = _strata(seed, row, draws, block[-1] + 1)
    for draw in range(draws):
        time = times[draw][block]
        masked = eligible & (_numbers(seed, Purpose.DIFFUSION_MASK, row * draws + draw, len(eligible)) < time)
        yield Draw(masked, np.divide(1.0, time, out=np.zeros_like(time), where=masked))


def _fixed_count_draws(seed: int, window: Window, row: int, draws: int, block_size: int) -> Iterator[Draw]:
    """In each block of n eligible tokens k of them masked, k uniform on 1 … n, weight n/k."""
    eligible, block = window.eligible, _block_numbers(window, block_size)
    num_blocks = block[-1] + 1
    sizes = np.bincount(block, weights=eligible, minlength=num_blocks)
    times = _strata(seed, row, draws, num_blocks)
    for draw in range(draws):
        counts = np.minimum(np.floor(times[draw] * sizes) + 1, sizes)
        numbers = _numbers(seed, Purpose.DIFFUSION_MASK, row * draws + draw, len(eligible))
        masked = eligible & (_ranks_within(block, np.where(eligible, numbers, 2.0)) < counts[block])
        weight = np.divide(sizes, counts, out=np.zeros_like(sizes), where=counts > 0)[block]
        yield Draw(masked, weight)


def _block_numbers(window: Window, block_size: int) -> npt.NDArray[np.int64]:
    length = len(window.tokens)
    return np.arange(length) // (block_size or length)


def _ranks_within(group: npt.NDArray[np.int64], keys: FloatArray) -> npt.NDArray[np.int64]:
    """The place of each key among those of its group, which are neighbours."""
    order = np.lexsort((keys, group))
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys))
    return ranks - np.searchsorted(group, group)


def _strata(seed: int, row: int, draws: int, blocks: int) -> FloatArray:
    """Times [draws, blocks]: every block has one in each of `draws` equal parts of [0, 1), in an order of its own."""
    numbers = _numbers(seed, Purpose.DIFFUSION_TIME, row, 2 * draws * blocks).reshape(2, draws, blocks)
    return (numbers[0].argsort(axis=0) + numbers[1]) / draws


def _numbers(seed: int, purpose: Purpose, row: int, length: int) -> FloatArray:
    return uniform(seed, purpose, torch.tensor([row]), length)[0].numpy()


def _weighted_nats(denoiser: Denoiser, window: Window, draws: Sequence[Draw], batch_size: int) -> FloatArray:
    """Σ over the draws of weight · nats, [length]."""
    masked = np.stack([draw.masked for draw in draws])
    weight = np.stack([draw.weight for draw in draws])
    total = np.zeros(len(window.tokens))
    for start in range(0, len(draws), batch_size):
        part = slice(start, start + batch_size)
        nats = _nats(denoiser, window, masked[part], masked[part], given_clean=True)
        total += (weight[part] * nats).sum(axis=0)
    return total


def _nats(denoiser: Denoiser, window: Window, hidden: BoolArray, asked: BoolArray, *, given_clean: bool) -> FloatArray:
    """−log p of the tokens at the places `asked` when those `hidden` are masks: [rows, length], zero elsewhere."""
    device = next(denoiser.model.parameters()).device
    clean = torch.from_numpy(window.tokens).to(device).expand(len(hidden), -1)
    noisy = clean.masked_fill(torch.from_numpy(hidden).to(device), denoiser.mask_id)
    chosen = torch.from_numpy(asked).to(device)
    is_fill = torch.from_numpy(window.documents < 0).to(device)
    segments = is_fill.long().expand(len(hidden), -1) if is_fill.any() else None
    with nvtx.range("score"):
        read = denoiser.nats_given_clean if given_clean else denoiser.nats
        nats = read(noisy, clean, chosen, segments=segments)
    result = np.zeros(hidden.shape)
    result[asked] = nats.cpu().numpy()
    return result


class _Sums:
    """What is added up for each document."""

    def __init__(self, byte_lengths: npt.NDArray[np.int64], eot_id: int) -> None:
        self._lengths = byte_lengths.copy()
        self._lengths[eot_id] = 0
        self._nats: list[float] = []
        self._tokens: list[int] = []
        self._bytes: list[int] = []

    def measured(self, documents: Iterable[IntArray]) -> Iterator[IntArray]:
        for document in documents:
            self._nats.append(0.0)
            self._tokens.append(len(document))
            self._bytes.append(int(self._lengths[document].sum()))
            yield document

    def add(self, window: Window, nats: FloatArray) -> None:
        for document in np.unique(window.documents[window.documents >= 0]):
            self._nats[document] += float(nats[window.documents == document].sum())

    def scores(self) -> Scores:
        return Scores(np.array(self._nats), np.array(self._tokens, np.int64), np.array(self._bytes, np.int64))
