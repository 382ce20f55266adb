"""One optimizer step, from micro-batches to new weights. The device may still work on it when the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from profiling import nvtx
from trainkit.averaging import update_average
from trainkit.norms import Probe
from trainkit.optimizers import clip_and_update, set_learning_rate
from trainkit.precision import autocast_context
from trainkit.run import Run
from trainkit.schedules import learning_rate_factor
from trainkit.state import State
from trainkit.step import accumulate_gradients
from trainkit.task import Batch


def take_step(run: Run, state: State, micro_batches: list[Batch], probe: Probe) -> None:
    """Update the weights from this rank's micro-batches; `probe` looks at what passes."""
    training, device, model = run.training, run.world.device, state.replica.module
    factor = learning_rate_factor(run.schedule, state.step, training.max_steps)
    set_learning_rate(state.optimizer, run.optimizer.learning_rate * factor)
    with nvtx.range("transfer"):
        batches = [to_device(batch, device) for batch in micro_batches]
    with probe.forward():
        sums = accumulate_gradients(
            state.replica,
            run.task,
            batches,
            run.world,
            autocast=autocast(run),
            scale=state.scaler.scale,
        )
    if run.inspect is not None:
        run.inspect(state.step + 1, micro_batches, sums, state.scaler.unscale)
    with nvtx.range("optimizer"):
        probe.before_update(state.scaler)
        norm, skip = clip_and_update(state.optimizer, model, clip=training.gradient_clip, scale=state.scaler)
        state.replica.after_update()
        probe.after_update()
        is_blameless = state.scaler.blames(skip)
        state.scaler.update(skip)
        if training.ema_decay:
            update_average(state.average, model, training.ema_decay, state.step + 1, skip)
    state.meter.add(sums, norm, skip)
    state.skips.add(state.step, skip, is_blameless, sums.is_finite, micro_batches)


def autocast(run: Run) -> Callable[[], AbstractContextManager[object]]:
    return partial(autocast_context, run.training.precision, run.world.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
