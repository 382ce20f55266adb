"""What the kit asks of whatever it trains: the `Task` protocol and the plain facts that it reports.

A task says two things about a batch: what each of its loss terms *counts* (`weights`, from data alone, before any
forward pass), and the loss itself, divided by the step's totals of those counts. The loop sums the weights over
micro-batches and ranks first, so that the gradient of the plain sum of all `Loss.value` is the gradient of the step.
A mean of per-batch means would weigh a half-empty batch like a full one; this cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor, nn

Batch: TypeAlias = Mapping[str, Tensor]
"""Named tensors, first dimension = rows. Sources add two names of their own:

- `sample`: int64 [rows], the row's global sample index in the run (the coordinate of its random numbers);
- `valid`: bool [rows], False for the zero-weight rows that fill the last micro-batch of a step.
"""


@dataclass(frozen=True)
class Loss:
    """One micro-batch's share of the step's loss."""

    value: Tensor
    """Scalar with a gradient, already divided by the step's global denominators."""
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    """`{name: (sum, count)}`, detached scalars on the device. The log shows Σ sum / Σ count over an interval."""


class Task(Protocol):
    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        """What each loss term counts in this batch: `{term: scalar}`, from data alone: no model, no gradient."""
        ...

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        """The batch's part of the loss. `model` may be wrapped (DDP, FSDP, compiled): call it, do not look inside.

        `denominators` holds, for each term of `weights`, its total over the step: all micro-batches, all ranks. A total
        is never zero (the loop replaces an empty one by one).
        """
        ...


@dataclass(frozen=True)
class RunFacts:
    """What the kit must know in order to report in the task's own units."""

    unit_name: str = "samples"
    """Plural name of what throughput counts, for instance `tokens`."""
    units_per_sample: int = 1
    """How many units one row of a batch holds; `training.total_batch_size` is in units and must be a multiple."""
    flops_per_unit: float = 0.0
    """Floating-point operations of one forward and backward pass per unit; 0 = unknown, utilisation is not shown."""
