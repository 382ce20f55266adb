"""One optimizer step: its gradient, from micro-batches on any number of ranks, and the update that it may make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from profiling import nvtx
from trainkit.distribution import World, sum_over_ranks, widest_float
from trainkit.reduction import Reducer
from trainkit.task import Batch, Task
from trainkit.tree import tree_sum


class Trained(Protocol):
    """What this module needs of a `trainkit.replicas.Replica`."""

    @property
    def forward(self) -> nn.Module: ...
    @property
    def reducer(self) -> Reducer: ...


@dataclass(frozen=True)
class StepSums:
    """What this rank's micro-batches of a step add up to; tensors on the device."""

    names: tuple[str, ...]
    """Of the metrics, in the order of their task."""
    values: Tensor
    """[metrics, 2], sums and counts in the widest float."""
    is_finite: Tensor
    """bool [micro-batches]: whether the loss was."""


def total_weights(task: Task, micro_batches: Sequence[Batch], world: World) -> dict[str, Tensor]:
    """Each term's denominator: its weights summed over micro-batches and ranks; an empty total becomes one."""
    parts = [task.weights(batch) for batch in micro_batches]
    wide = widest_float(world.device)
    local = {name: tree_sum(torch.stack([part[name].to(wide) for part in parts])) for name in parts[0]}
    return {name: torch.where(total > 0, total, 1.0) for name, total in sum_over_ranks(local, world).items()}


def accumulate_gradients(
    replica: Trained,
    task: Task,
    micro_batches: Sequence[Batch],
    world: World,
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> StepSums:
    """Leave the step's gradient in `.grad`, the same on all ranks, and return this rank's sums.

    Ranks may have different numbers of micro-batches, each at least one. A loss that is not finite has a gradient that
    is not: the news travels to the other ranks with the gradients.
    """
    denominators = total_weights(task, micro_batches, world)
    losses: list[Tensor] = []
    metrics: list[Tensor] = []
    names: tuple[str, ...] = ()
    for index, batch in enumerate(micro_batches):
        with replica.reducer.leaf(index, len(micro_batches)):
            with nvtx.range("forward"), autocast():
                loss = task.loss(replica.forward, batch, denominators)
            with nvtx.range("backward"):
                value = scale(loss.value)
                value.backward(torch.where(value.detach().isfinite(), 1.0, torch.nan).to(value.dtype))
        losses.append(loss.value.detach())
        names = tuple(loss.metrics)
        metrics += [
            x.detach().to(world.device, widest_float(world.device)) for pair in loss.metrics.values() for x in pair
        ]
    replica.reducer.finish()
    values = torch.stack(metrics).view(len(micro_batches), len(names), 2) if names else torch.zeros(len(losses), 0, 2)
    return StepSums(names, tree_sum(values), torch.stack(losses).isfinite())
