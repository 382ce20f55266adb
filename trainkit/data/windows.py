"""Batches of windows of token files: the same samples in each step for any number of ranks and size of a micro-batch.

Step s takes the samples s·B … s·B + B − 1 of the order (`trainkit.data.orders`); the ranks share them in order.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from trainkit.data.orders import Order
from trainkit.errors import UserError
from trainkit.task import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class MegatronSource:
    """One rank's batches of the samples of `order`. See `trainkit.data.specs` and `trainkit.specs` for the settings."""

    order: Order
    samples_per_step: int
    """B: samples of one step over all ranks."""
    device_batch_size: int
    """Most rows of a micro-batch."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert min(self.samples_per_step, self.device_batch_size, self.world_size) >= 1
        assert 0 <= self.rank < self.world_size

    @cached_property
    def rows(self) -> int:
        """Rows of every micro-batch, the same for all ranks and steps: no more than the largest share fills."""
        return min(self.device_batch_size, -(-self.samples_per_step // self.world_size))

    def steps(self, states: list[dict[str, Any]] | None = None) -> Generator[tuple[list[Batch], dict[str, Any]]]:
        """This rank's micro-batches of the next step, and the JSON-able state after it, while the order has samples.

        A batch holds `tokens` and `documents`, int64 [rows, context_length + 1], `sample`, int64 [rows], and `valid`,
        bool [rows]. `documents` numbers the documents of a row from 0. Rows that only fill the last micro-batch repeat
        a real row and are not `valid`. A state of another order (other data, window length, seed) is a `UserError`.
        """
        next_sample = 0 if states is None else self._position(states[0])  # all ranks are at the same sample
        while self.order.count is None or next_sample + self.samples_per_step <= self.order.count:
            batches = self._step(next_sample)
            next_sample += self.samples_per_step
            yield batches, {"next_sample": next_sample, **self.order.identity}

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
        tokens, documents = self.order.read(sample)
        arrays = {"tokens": tokens, "documents": documents, "sample": sample, "valid": valid}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _position(self, state: dict[str, Any]) -> int:
        identity = self.order.identity
        names = sorted({*identity, *state} - {"next_sample"})
        changed = [name for name in names if state.get(name) != identity.get(name)]
        if changed == ["num_samples"]:
            raise UserError(
                'data.order = "megatron" depends on training.max_steps and total_batch_size: it was made for '
                f"{state['num_samples']:,} samples and now would be for {identity['num_samples']:,}; resume with the "
                'same ones, or start a new run (with data.order = "stable" its length may change)'
            )
        for name in changed:
            raise UserError(
                f"the checkpoint was trained with {name} {state.get(name)}, {self.order.name} is now read with {name} "
                f"{identity.get(name)}; resume with the same data, order, context_length and seed, or start a new run"
            )
        return int(state["next_sample"])
