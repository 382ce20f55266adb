"""Metric sums between two log records; they stay tensors on the device until someone reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.distribution import World, all_ranks
from trainkit.step import StepSums
from trainkit.tree import tree_sum

Totals = Mapping[str, tuple[float, float]]


def means(totals: Totals) -> dict[str, float]:
    """Σ sum / Σ count of each metric that counted anything."""
    return {name: total / count for name, (total, count) in totals.items() if count}


@dataclass
class SmoothedLoss:
    """An exponential moving average of the steps' losses: the noise of single batches is gone, the trend is left.

    Corrected for its start like Adam's moments, so that the first value is the first loss.
    """

    decay: float = 0.98
    total: float = 0.0
    weight: float = 0.0

    def add(self, loss: float) -> None:
        if math.isfinite(loss):
            self.total = self.decay * self.total + (1 - self.decay) * loss
            self.weight = self.decay * self.weight + (1 - self.decay)

    def values(self) -> dict[str, float]:
        """For a record: `loss_ema`, once there was a loss."""
        return {"loss_ema": self.total / self.weight} if self.weight else {}

    def state(self) -> dict[str, float]:
        return {"total": self.total, "weight": self.weight}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.total, self.weight = state.get("total", 0.0), state.get("weight", 0.0)


class Meter:
    """Adds `(sum, count)` pairs: over ranks in the order of `trainkit.tree`, over steps one after the other.

    So the totals have the same bits on any number of ranks that holds whole subtrees. Its open sums belong to a
    checkpoint: a run that is interrupted between two records then writes the same next record as one that was not.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._own = torch.tensor(float(world.is_main), device=world.device)
        """What all ranks know is counted by one of them."""
        self.smoothed_loss = SmoothedLoss()
        """Of the metric `loss`, up to the step that `totals` was last called for."""
        self._read: dict[str, tuple[float, float]] = {}
        self._unread: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, sums: StepSums, norm: Tensor, skip: Tensor) -> None:
        """The sums of one step and the norm of its gradient, which all ranks know; nothing where `skip`."""
        shared = torch.stack([norm * self._own, self._own]).to(sums.values.dtype)
        values = torch.cat([sums.values.view(-1), shared])
        self._unread.append(((*sums.names, "gradient_norm"), torch.where(skip, 0.0, values)))

    def totals(self) -> dict[str, tuple[float, float]]:
        """`{name: (sum, count)}` over all ranks, which all must call it: one collective, one wait for the device."""
        if self._unread:
            over_ranks = tree_sum(all_ranks(torch.cat([values for _, values in self._unread]), self._world))
            numbers = iter(over_ranks.tolist())
            for names, _ in self._unread:
                for name in names:
                    total, count = next(numbers), next(numbers)
                    before = self._read.get(name, (0.0, 0.0))
                    self._read[name] = (before[0] + total, before[1] + count)
                    if name == "loss" and count:
                        self.smoothed_loss.add(total / count)
            self._unread.clear()
        return dict(self._read)

    def clear(self) -> None:
        self._read.clear()
        self._unread.clear()

    def load_totals(self, totals: Totals) -> None:
        """Go on from what `totals` gave."""
        self._read = {name: (total, count) for name, (total, count) in totals.items()}
