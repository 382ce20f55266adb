"""Which tokens sample g of a run holds.

`stable`, the default: window k of a file holds its tokens k·L … k·L + L (L = `context_length`), L + 1 tokens at stride
L, so that no target stands in two windows. Sample g is window `permutation(g mod windows)` of epoch g div windows, with
a keyed permutation for each epoch: no shuffled index in memory, any sample found in constant time, and a longer run
only appends.

`megatron`: what Megatron-LM's `GPTDataset` serves, number for number. The sequences of all epochs of the run are
shuffled and laid end to end, the stream is cut into windows, and these are shuffled again, by NumPy's `RandomState`.
The order depends on how many samples the run needs: a longer run is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainkit.data.blends import Blend, deal_by_greedy_error, deal_by_weight, megatron_shares
from trainkit.data.megatron import IndexedTokens
from trainkit.data.specs import OrderName
from trainkit.errors import UserError
from trainkit.random import Purpose, derive_seed, permute

Int64Array = npt.NDArray[np.int64]
BLOCK = 1024
"""Samples whose windows are found together."""


class Order(Protocol):
    """The samples of a run by their numbers."""

    @property
    def name(self) -> str:
        """What messages call the data."""
        ...

    @property
    def count(self) -> int | None:
        """Number of samples; None = without end."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that differ where any sample would."""
        ...

    def read(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Tokens, and the number from 0 in each row of the document that each lies in: int64 [samples, length + 1].

        The token that ends a document belongs to it.
        """
        ...


def build_order(
    order: OrderName,
    data: Sequence[IndexedTokens],
    weights: Sequence[float],
    *,
    context_length: int,
    seed: int,
    num_samples: int,
) -> Order:
    """The order of one token file, or of a blend of several by `weights`.

    `num_samples` is what the whole run takes; only `megatron` depends on it. `UserError` for a file that is shorter
    than one window, and for what Megatron-LM's order cannot do.
    """
    for one in data:
        if len(one.tokens) <= context_length:
            raise UserError(
                f"{one.prefix} holds {len(one.tokens)} tokens, one window of context_length {context_length} takes "
                f"{context_length + 1}; give it more text or a shorter context_length"
            )
    if order == "megatron" and seed >= 2**32:
        raise UserError(f"the order of Megatron-LM takes a seed below 2³², not {seed}; choose another run.seed")
    match order, len(data):
        case "stable", 1:
            return StableOrder(data[0], context_length, seed)
        case "megatron", 1:
            return MegatronOrder(data[0], context_length, seed, num_samples)
        case "stable", _:
            # Keyed by place in the list: files of equal length must not walk through their windows in step.
            seeds = [derive_seed(seed, f"blend/{place}") for place in range(len(data))]
            members = [StableOrder(one, context_length, own) for one, own in zip(data, seeds, strict=True)]
            return Blend(members, deal_by_weight(weights), {"weights": list(weights), "seed": seed}, count=None)
        case _:
            shares = megatron_shares(weights, num_samples)
            members = [MegatronOrder(one, context_length, seed, n) for one, n in zip(data, shares.built, strict=True)]
            deal = deal_by_greedy_error(weights, shares.size, [len(one.shuffle_index) for one in members])
            facts = {"weights": list(weights), "num_samples": num_samples}
            return Blend(members, deal, facts, count=num_samples)


@dataclass(frozen=True, eq=False)
class StableOrder:
    """Windows of a file at stride `context_length`, permuted anew in each epoch."""

    data: IndexedTokens
    context_length: int
    seed: int
    count: None = None

    @property
    def name(self) -> str:
        return str(self.data.prefix)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "order": "stable",
            "data": self.data.identity,
            "context_length": self.context_length,
            "seed": self.seed,
        }

    @cached_property
    def windows(self) -> int:
        """Windows of one epoch."""
        return (len(self.data.tokens) - 1) // self.context_length

    def window_of(self, samples: Int64Array) -> Int64Array:
        """Which window each sample [n] reads, [n]."""
        epochs, within = np.divmod(samples, self.windows)
        result = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            seed = derive_seed(self.seed, f"epoch/{epoch}")
            result[chosen] = permute(within[chosen], self.windows, seed, Purpose.DATA_ORDER)
        return result

    @cached_property
    def _block(self) -> Callable[[int], Int64Array]:
        """`window_of` of the samples n·BLOCK …: the cost of a permutation is in the call more than in its numbers."""
        return lru_cache(maxsize=4)(lambda n: self.window_of(np.arange(n * BLOCK, (n + 1) * BLOCK)))

    def read(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        blocks, within = np.divmod(samples, BLOCK)
        windows = np.empty_like(samples)
        for block in dict.fromkeys(blocks.tolist()):
            chosen = blocks == block
            windows[chosen] = self._block(block)[within[chosen]]
        return gather_windows(self.data, windows * self.context_length, self.context_length)


@dataclass(frozen=True, eq=False)
class MegatronOrder:
    """`GPTDataset(…, num_samples)` of megatron-core with `random_seed = seed` and one extra token per sample.

    Its "documents" are the sequences of the index: documents of several are shuffled in parts, as there.
    """

    data: IndexedTokens
    context_length: int
    seed: int
    num_samples: int

    @property
    def name(self) -> str:
        return str(self.data.prefix)

    @property
    def count(self) -> int:
        return self.num_samples

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "order": "megatron",
            "data": self.data.identity,
            "context_length": self.context_length,
            "seed": self.seed,
            "num_samples": self.num_samples,
        }

    @cached_property
    def _indices(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.integer[Any]]]:
        """The document index and the shuffle index, which draw from one stream of random numbers in this order."""
        length, per_epoch = self.context_length, len(self.data.tokens)
        epochs = max(1, -(-(self.num_samples * length + 1) // per_epoch))
        total = (epochs * per_epoch - 1) // length
        before_last = ((epochs - 1) * per_epoch - 1) // length
        # An epoch that is needed in small part only is kept apart: else its few documents would displace those of whole
        # epochs from anywhere in the run.
        is_separate = epochs > 1 and self.num_samples - before_last < int(0.80 * ((per_epoch - 1) // length))
        random = np.random.RandomState(self.seed)
        sequences = np.arange(len(self.data.lengths), dtype=np.int32)
        groups = (epochs - 1, 1) if is_separate else (epochs,)
        document_index = _shuffled([np.tile(sequences, count) for count in groups], random)
        kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
        bounds = (0, before_last, total) if is_separate else (0, total)
        ranges = [np.arange(first, last, dtype=kind) for first, last in pairwise(bounds)]
        return document_index, _shuffled(ranges, random)

    @property
    def document_index(self) -> npt.NDArray[np.int32]:
        """The sequences in the order in which all epochs read them, [epochs · sequences]."""
        return self._indices[0]

    @property
    def shuffle_index(self) -> npt.NDArray[np.integer[Any]]:
        """Which window of the stream each sample is, at least [num_samples]."""
        return self._indices[1]

    @cached_property
    def _starts(self) -> Int64Array:
        """Where in the stream each sequence of `document_index` begins, and its end: [epochs · sequences + 1]."""
        starts = np.zeros(len(self.document_index) + 1, np.int64)
        np.cumsum(self.data.lengths[self.document_index], out=starts[1:])
        return starts

    @property
    def sample_index(self) -> Int64Array:
        """Where each window begins: its place in `document_index` and the token in that sequence, [windows + 1, 2].

        What `GPTDataset` stores and `read` computes for the windows it is asked for.
        """
        positions = np.arange(len(self.shuffle_index) + 1, dtype=np.int64) * self.context_length
        places = np.searchsorted(self._starts, positions, side="right") - 1
        places[0] = 0  # not behind the empty sequences that may stand in front
        return np.stack([places, positions - self._starts[places]], axis=1)

    def read(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        length, starts = self.context_length, self._starts
        begin = self.shuffle_index[samples].astype(np.int64) * length
        first = np.searchsorted(starts, begin, side="right") - 1
        counts = np.searchsorted(starts, begin + length, side="right") - first
        row = np.repeat(np.arange(len(samples)), counts)
        place = np.arange(len(row)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        lengths = np.minimum(starts[place + 1], begin[row] + length + 1) - np.maximum(starts[place], begin[row])
        in_file = self.data.pointers[self.document_index[place]] // self.data.tokens.itemsize
        shift = np.repeat(in_file - starts[place], lengths).reshape(len(samples), -1)
        tokens = self.data.tokens[begin[:, None] + np.arange(length + 1) + shift].astype(np.int64)
        # An empty sequence between two others gets no number of its own.
        number = np.cumsum(lengths > 0) - 1
        number -= number[np.cumsum(counts) - counts][row]
        return tokens, np.repeat(number, lengths).reshape(tokens.shape)


def _shuffled(parts: list[npt.NDArray[Any]], random: np.random.RandomState) -> npt.NDArray[Any]:
    for part in parts:
        random.shuffle(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def gather_windows(data: IndexedTokens, starts: Int64Array, length: int) -> tuple[Int64Array, Int64Array]:
    """The `length` + 1 tokens from each of `starts` [rows], and the document that each lies in, from 0 in every row.

    Both int64 [rows, length + 1].
    """
    tokens = data.tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return tokens, _document_numbers(data, starts, length)


def _document_numbers(data: IndexedTokens, starts: Int64Array, length: int) -> Int64Array:
    """Marks the token at which each document begins and sums the marks along the row: no search for every token."""
    pointers, itemsize = data.document_pointers, data.tokens.itemsize
    first, last = data.documents_up_to(np.stack([starts, starts + length]) * itemsize)
    counts = last - first
    row = np.repeat(np.arange(len(starts)), counts)
    boundary = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    marks = np.zeros((len(starts), length + 1), np.int64)
    marks[row, pointers[boundary] // itemsize - starts[row]] = 1
    return np.cumsum(marks, axis=1)
