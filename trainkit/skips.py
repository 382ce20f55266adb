"""Steps that changed nothing, because their loss or gradient was infinite or NaN.

The device decides about each of them and nobody waits for it; here its answers are kept until a record is due, then
counted and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainkit.distribution import World, gather_over_ranks
from trainkit.task import Batch

_SHOWN = 8


@dataclass(frozen=True)
class _Step:
    number: int
    skipped: Tensor
    """bool scalar."""
    is_blameless: Tensor
    """bool scalar: skipped because the loss scale of `fp16` was too large; otherwise the numbers were bad."""
    is_finite: Tensor
    """bool [micro-batches] of this rank: whether the loss was."""
    samples: list[Tensor]
    """Of each micro-batch of this rank that says which samples it holds; on the host."""


@dataclass
class Skips:
    """Counts skipped steps. All ranks hold the same counts."""

    world: World
    total: int = 0
    in_a_row: int = 0
    most_in_a_row: int = 0
    """Over the life of this object; a good step does not make it smaller."""
    _unread: list[_Step] = field(default_factory=list[_Step])

    def add(self, step: int, skip: Tensor, is_blameless: Tensor, is_finite: Tensor, batches: Sequence[Batch]) -> None:
        """Remember what the device decided about `step` (0-based)."""
        samples = [batch["sample"] for batch in batches if "sample" in batch]
        self._unread.append(_Step(step, skip, is_blameless, is_finite, samples))

    def read(self) -> list[str]:
        """Count the steps since the last call, and describe them. All ranks must call it; it waits for the device."""
        steps, self._unread = self._unread, []
        if not steps:
            return []
        told: list[str] = []
        decided = torch.stack([torch.stack([s.skipped for s in steps]), torch.stack([s.is_blameless for s in steps])])
        for step, skipped, is_blameless in zip(steps, *decided.tolist(), strict=True):
            if not skipped:
                self.in_a_row = 0
            elif not is_blameless:
                self.total += 1
                self.in_a_row += 1
                self.most_in_a_row = max(self.most_in_a_row, self.in_a_row)
                told.append(f"step {step.number + 1} changed nothing: {self._describe(step)}")
        return told

    def state(self) -> dict[str, int]:
        """JSON for a checkpoint; call `read` first."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
        self.most_in_a_row = self.in_a_row

    def _describe(self, step: _Step) -> str:
        """What was not finite, and in which samples of which rank as far as that is known."""
        own = [
            sorted(set(samples.tolist()))
            for samples, is_finite in zip(step.samples, step.is_finite.tolist(), strict=False)
            if not is_finite
        ]
        by_rank = gather_over_ranks(([x for part in own for x in part], [s.tolist() for s in step.samples]), self.world)
        bad = sorted({x for mine, _ in by_rank for x in mine})
        if bad:
            return f"the loss of a micro-batch was infinite or NaN; its samples: {_listed(bad)}"
        seen = sorted({x for _, batches in by_rank for batch in batches for x in batch})
        return "its gradient was infinite or NaN" + (f"; samples of the step: {_listed(seen)}" if seen else "")


def _listed(samples: list[int]) -> str:
    if len(samples) > _SHOWN and samples[-1] - samples[0] == len(samples) - 1:
        return f"{samples[0]} to {samples[-1]}"
    rest = len(samples) - _SHOWN
    return ", ".join(map(str, samples[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
