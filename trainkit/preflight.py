"""What a run will cost, said before its first step: parameters, units, memory, time.

One micro-batch goes forward and backward twice, the second time with a stopwatch. Training has no hidden random state,
so nothing of this shows in the result; and a batch that does not fit fails now rather than later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from trainkit.distribution import World
from trainkit.replicas import Replica
from trainkit.task import Batch, RunFacts, Task
from trainkit.throughput import peak_memory


@dataclass(frozen=True)
class Estimate:
    parameters: int
    units: int
    """Over the steps that remain."""
    memory_bytes: int
    """Peak of one rank, optimizer state included."""
    seconds: float
    """Of training alone, without evaluation and saving."""


def estimate_run(
    replica: Replica,
    task: Task,
    micro_batches: Sequence[Batch],
    world: World,
    *,
    steps: int,
    units_per_step: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Estimate:
    """Try the first micro-batch and extrapolate. Leaves no gradient behind."""
    batch = micro_batches[0]
    weights = {name: weight.float().clamp(min=1) for name, weight in task.weights(batch).items()}
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with replica.no_sync():
            with autocast():
                loss = task.loss(replica.forward, batch, weights)
            loss.value.backward()
        _wait(world.device)
        seconds = time.perf_counter() - start
        replica.module.zero_grad(set_to_none=True)
    return Estimate(
        parameters=count_parameters(replica.module),
        units=steps * units_per_step,
        memory_bytes=peak_memory(world.device) + _optimizer_bytes(replica.module),
        seconds=seconds * len(micro_batches) * steps,
    )


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def describe(estimate: Estimate, facts: RunFacts, world: World) -> str:
    """One line for people."""
    where = f"{world.size} × {world.device.type}" if world.size > 1 else world.device.type
    return (
        f"{estimate.parameters / 1e6:,.2f}M parameters · {_format_units(estimate.units)} {facts.unit_name} to go · "
        f"about {estimate.memory_bytes / 2**30:.1f} GiB · about {format_duration(estimate.seconds)} on {where}"
    )


def _format_units(units: int) -> str:
    return f"{units / 1e6:,.1f}M" if units >= 1e6 else f"{units:,}"


def format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _optimizer_bytes(model: nn.Module) -> int:
    """Adam keeps two 32-bit numbers for each trained parameter, allocated at the first update."""
    return sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
