"""Metric sums between two log records; they stay tensors on the device until someone reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainkit.distribution import World, sum_over_ranks, widest_float

Totals = Mapping[str, tuple[float, float]]


def means(totals: Totals) -> dict[str, float]:
    """Σ sum / Σ count of each metric that counted anything."""
    return {name: total / count for name, (total, count) in totals.items() if count}


class Meter:
    """Adds `(sum, count)` pairs, on each rank its own.

    Its open sums belong to a checkpoint: a run that is interrupted between two records then writes the same next record
    as one that was not.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, pair in metrics.items():
            value = torch.stack([x.detach().to(self._world.device, widest_float(self._world.device)) for x in pair])
            before = self._sums.get(name)
            self._sums[name] = value if before is None else before + value

    def totals(self) -> dict[str, tuple[float, float]]:
        """`{name: (sum, count)}` over all ranks, which all must call it: one collective, one wait for the device."""
        parts = {f"{name}/{i}": value[i] for name, value in self._sums.items() for i in (0, 1)}
        summed = sum_over_ranks(parts, self._world)
        numbers = dict(zip(summed, torch.stack(list(summed.values())).tolist(), strict=True)) if summed else {}
        return {name: (numbers[f"{name}/0"], numbers[f"{name}/1"]) for name in self._sums}

    def clear(self) -> None:
        self._sums.clear()

    def load_totals(self, totals: Totals) -> None:
        """Go on from what `totals` gave; the first rank carries it all."""
        share = 1.0 if self._world.is_main else 0.0
        self._sums = {
            name: torch.tensor(pair, dtype=widest_float(self._world.device), device=self._world.device) * share
            for name, pair in totals.items()
        }
