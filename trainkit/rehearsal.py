"""One micro-batch forward and backward, on every rank, before the data are there: does the run fit, does it compile?

The model of the trial is thrown away. On CUDA its memory is measured, and what the optimizer and the averaged weights
will take is added; elsewhere only an allocation that is refused is noticed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from profiling import nvtx
from trainkit.distribution import World, gather_over_ranks
from trainkit.precision import autocast_context
from trainkit.replicas import replicate
from trainkit.specs import DistributedSpec, OptimizerSpec, TrainingSpec
from trainkit.task import Batch, Task

COMFORTABLE = 0.92
"""Share of the memory that a batch size found by search may take: fragments and communication need some, too."""
_REFUSALS = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class Rehearsal:
    """How it went, on the rank where it went worst."""

    needs: int
    """Bytes; 0 where they are not known, because an allocation was refused or the device does not count."""
    has: int
    """Bytes of the device that this process can have; 0 = not known."""
    was_refused: bool

    @property
    def fits(self) -> bool:
        return not self.was_refused and (not self.has or self.needs <= self.has)

    @property
    def fits_comfortably(self) -> bool:
        return self.fits and (not self.has or self.needs <= COMFORTABLE * self.has)


def rehearse(
    build: Callable[[], nn.Module],
    task: Task,
    batch: Batch,
    world: World,
    *,
    training: TrainingSpec,
    optimizer: OptimizerSpec,
    distributed: DistributedSpec,
) -> Rehearsal:
    """Try `batch`; all ranks call it and get the same answer."""
    has = _available(world.device)
    try:
        with nvtx.range("trial"):
            needs = _try(build(), task, batch, world, training, optimizer, distributed)
        mine = Rehearsal(needs if has else 0, has, was_refused=False)
    except RuntimeError as error:  # what PyTorch raises on CUDA is one, and on the CPU nothing tells it from others
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in _REFUSALS):
            raise
        mine = Rehearsal(0, has, was_refused=True)
    _give_back(world.device)
    return max(gather_over_ranks(mine, world), key=lambda one: (one.was_refused, not one.fits, one.needs))


def _try(
    model: nn.Module,
    task: Task,
    batch: Batch,
    world: World,
    training: TrainingSpec,
    optimizer: OptimizerSpec,
    distributed: DistributedSpec,
) -> int:
    """Bytes that a step takes at its peak."""
    model = model.to(world.device).train()
    if training.compile:
        model.compile()
    replica = replicate(model, world, distributed)
    batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
    weights = {name: weight.float().clamp(min=1) for name, weight in task.weights(batch).items()}
    with replica.no_sync():
        with autocast_context(training.precision, world.device):
            loss = task.loss(replica.forward, batch, weights)
        loss.value.backward()
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if distributed.strategy != "replicate":
        own = -(-own // world.size)
    state = own * (8 if optimizer.kind == "adamw" else 4) + (4 * own if training.ema_decay else 0)
    if world.device.type != "cuda":
        return state
    torch.cuda.synchronize(world.device)
    return torch.cuda.max_memory_allocated(world.device) + state


def _available(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    _give_back(device)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)


def _give_back(device: torch.device) -> None:
    """Whatever the trial held, so that it burdens neither the next one nor the run."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
