"""The gradient of one optimizer step, from micro-batches on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from profiling import nvtx
from trainkit.distribution import Replica, World, sum_over_ranks, widest_float
from trainkit.task import Batch, Task

Metrics = dict[str, tuple[Tensor, Tensor]]


def total_weights(task: Task, micro_batches: Sequence[Batch], world: World) -> dict[str, Tensor]:
    """Each term's denominator: its weights summed over micro-batches and ranks; an empty total becomes one."""
    parts = [task.weights(batch) for batch in micro_batches]
    wide = widest_float(world.device)
    local = {name: torch.stack([part[name].to(wide) for part in parts]).sum() for name in parts[0]}
    return {name: torch.where(total > 0, total, 1.0) for name, total in sum_over_ranks(local, world).items()}


def accumulate_gradients(
    replica: Replica,
    task: Task,
    micro_batches: Sequence[Batch],
    world: World,
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> Metrics:
    """Add the step's gradient into `.grad` (all ranks end with the same) and return this rank's metric sums.

    Ranks may have different numbers of micro-batches, each at least one; only the last backward pass communicates.
    """
    denominators = total_weights(task, micro_batches, world)
    metrics: Metrics = {}
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else replica.no_sync():
            with nvtx.range("forward"), autocast():
                loss = task.loss(replica.forward, batch, denominators)
            with nvtx.range("backward"):
                scale(loss.value).backward()
        for name, (total, count) in loss.metrics.items():
            before = metrics.get(name)
            metrics[name] = (total, count) if before is None else (before[0] + total, before[1] + count)
    return metrics
