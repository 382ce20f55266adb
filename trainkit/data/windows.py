"""Windows of a token file, in an order that depends on nothing but the seed.

Window k holds the tokens k·L … k·L + L of the concatenated documents (L = `context_length`): L + 1 tokens at stride L,
so that no target stands in two windows. Sample g of a run is window `permutation(g mod windows)` of epoch g div
windows, with a keyed permutation for each epoch: no shuffled index in memory, any sample found in constant time, and a
longer run only appends. A step takes the next B samples whatever the number of ranks and the size of a micro-batch;
ranks share them in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainkit.data.megatron import IndexedTokens
from trainkit.errors import UserError
from trainkit.random import Purpose, derive_seed, permute
from trainkit.task import Batch

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MegatronSource:
    """One rank's batches of windows of `data`. See `trainkit.data.specs` and `trainkit.specs` for the settings.

    A file that is shorter than one window is a `UserError` at construction.
    """

    data: IndexedTokens
    context_length: int
    samples_per_step: int
    """B: samples of one step over all ranks."""
    device_batch_size: int
    """Most rows of a micro-batch."""
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert min(self.context_length, self.samples_per_step, self.device_batch_size, self.world_size) >= 1
        assert 0 <= self.rank < self.world_size
        if len(self.data.tokens) <= self.context_length:
            raise UserError(
                f"{self.data.prefix} holds {len(self.data.tokens)} tokens, one window of context_length "
                f"{self.context_length} takes {self.context_length + 1}; give it more text or a shorter context_length"
            )

    @cached_property
    def windows(self) -> int:
        """Windows of one epoch."""
        return (len(self.data.tokens) - 1) // self.context_length

    @cached_property
    def rows(self) -> int:
        """Rows of every micro-batch, the same for all ranks and steps: no more than the largest share fills."""
        return min(self.device_batch_size, -(-self.samples_per_step // self.world_size))

    def window_of(self, samples: Int64Array) -> Int64Array:
        """Which window each global sample number [n] of the run reads, [n]."""
        epochs, within = np.divmod(samples, self.windows)
        result = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            seed = derive_seed(self.seed, f"epoch/{epoch}")
            result[chosen] = permute(within[chosen], self.windows, seed, Purpose.DATA_ORDER)
        return result

    def steps(self, states: list[dict[str, Any]] | None = None) -> Iterator[tuple[list[Batch], dict[str, Any]]]:
        """Without end: this rank's micro-batches of the next step, and the JSON-able state after it.

        A batch holds `tokens` and `documents`, int64 [rows, context_length + 1], `sample`, int64 [rows], and `valid`,
        bool [rows]. `documents` numbers the documents of a row from 0. Rows that only fill the last micro-batch repeat
        a real row and are not `valid`. A state of other data, another window length or seed is a `UserError`.
        """
        next_sample = 0 if states is None else self._position(states[0])  # all ranks are at the same sample
        while True:
            batches = self._step(next_sample)
            next_sample += self.samples_per_step
            yield batches, self._state(next_sample)

    def _step(self, first: int) -> list[Batch]:
        shares = (self.samples_per_step * share // self.world_size for share in (self.rank, self.rank + 1))
        begin, end = (first + share for share in shares)
        # A rank without a sample still takes part in the step's collectives, with one micro-batch that counts nothing.
        fills = range(begin, max(end, begin + 1), self.rows)
        return [self._micro_batch(start, end, fallback=begin) for start in fills]

    def _micro_batch(self, start: int, end: int, *, fallback: int) -> Batch:
        """Samples from `start`, as many as fit and below `end`; the other rows repeat the sample `fallback`."""
        sample = np.arange(start, start + self.rows, dtype=np.int64)
        valid = sample < end
        sample[~valid] = fallback
        tokens, documents = gather_windows(self.data, self.window_of(sample) * self.context_length, self.context_length)
        arrays = {"tokens": tokens, "documents": documents, "sample": sample, "valid": valid}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _state(self, next_sample: int) -> dict[str, Any]:
        return {"next_sample": next_sample, **self._identity}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {"data": self.data.identity, "context_length": self.context_length, "seed": self.seed}

    def _position(self, state: dict[str, Any]) -> int:
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint was trained with {name} {state.get(name)}, {self.data.prefix} is now read with "
                    f"{name} {value}; resume with the same data, context_length and seed, or start a new run"
                )
        return int(state["next_sample"])


def gather_windows(data: IndexedTokens, starts: Int64Array, length: int) -> tuple[Int64Array, Int64Array]:
    """The `length` + 1 tokens from each of `starts` [rows], and the document that each lies in, from 0 in every row.

    Both int64 [rows, length + 1]. The token that ends a document belongs to it.
    """
    tokens = np.lib.stride_tricks.sliding_window_view(data.tokens, length + 1)[starts].astype(np.int64)
    return tokens, _document_numbers(data, starts, length)


def _document_numbers(data: IndexedTokens, starts: Int64Array, length: int) -> Int64Array:
    """Marks the token at which each document begins and sums the marks along the row: no search for every token."""
    pointers, itemsize = data.document_pointers, data.tokens.itemsize
    first, last = _count_up_to(pointers, np.stack([starts, starts + length]) * itemsize)
    counts = last - first
    row = np.repeat(np.arange(len(starts)), counts)
    boundary = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    marks = np.zeros((len(starts), length + 1), np.int64)
    marks[row, pointers[boundary] // itemsize - starts[row]] = 1
    return np.cumsum(marks, axis=1)


def _count_up_to(values: Int64Array, keys: Int64Array) -> Int64Array:
    """`np.searchsorted(values, keys, side="right")`, which would copy the whole table: the file does not align it."""
    low, high = np.zeros_like(keys), np.full_like(keys, len(values))
    for _ in range(len(values).bit_length()):
        middle = (low + high) >> 1
        # Where low has met high = len(values), the clipped index compares as "not greater" and low would pass high.
        below = (low < high) & (values[np.minimum(middle, len(values) - 1)] <= keys)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    return low
