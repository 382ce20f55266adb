"""Metric sums between two log records; they stay tensors on the device until someone reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainkit.distribution import World, all_ranks
from trainkit.step import StepSums
from trainkit.tree import tree_sum

Totals = Mapping[str, tuple[float, float]]


def means(totals: Totals) -> dict[str, float]:
    """Σ sum / Σ count of each metric that counted anything."""
    return {name: total / count for name, (total, count) in totals.items() if count}


class Meter:
    """Adds `(sum, count)` pairs: over ranks in the order of `trainkit.tree`, over steps one after the other.

    So the totals have the same bits on any number of ranks that holds whole subtrees. Its open sums belong to a
    checkpoint: a run that is interrupted between two records then writes the same next record as one that was not.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._read: dict[str, tuple[float, float]] = {}
        self._unread: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, sums: StepSums, norm: Tensor, skip: Tensor) -> None:
        """The sums of one step and the norm of its gradient, which all ranks know; nothing where `skip`."""
        # What all ranks know is counted by one of them.
        own = torch.full_like(norm, float(self._world.is_main))
        values = torch.cat([sums.values.view(-1), torch.stack([norm * own, own]).to(sums.values.dtype)])
        self._unread.append(((*sums.names, "gradient_norm"), torch.where(skip, 0.0, values)))

    def totals(self) -> dict[str, tuple[float, float]]:
        """`{name: (sum, count)}` over all ranks, which all must call it: one collective, one wait for the device."""
        if self._unread:
            over_ranks = tree_sum(all_ranks(torch.cat([values for _, values in self._unread]), self._world))
            numbers = iter(over_ranks.tolist())
            for names, _ in self._unread:
                for name in names:
                    total, count = self._read.get(name, (0.0, 0.0))
                    self._read[name] = (total + next(numbers), count + next(numbers))
            self._unread.clear()
        return dict(self._read)

    def clear(self) -> None:
        self._read.clear()
        self._unread.clear()

    def load_totals(self, totals: Totals) -> None:
        """Go on from what `totals` gave."""
        self._read = {name: (total, count) for name, (total, count) in totals.items()}
