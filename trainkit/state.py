"""What changes while training: built from a run's specs, put back from a checkpoint."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.averaging import averaged_weights, start_average
from trainkit.checkpoint_writer import CheckpointWriter
from trainkit.checkpoints import Snapshot, load_model_tensors
from trainkit.distribution import StopVote
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.fully_sharded import cut_like
from trainkit.meter import Meter
from trainkit.optimizers import build_optimizer, load_optimizer_tensors
from trainkit.precision import LossScale
from trainkit.replicas import Replica, bits_of_tree, check_bits_of_tree, check_distribution, replicate
from trainkit.run import DataState, Run, samples_per_step
from trainkit.skips import Skips


@dataclass
class State:
    replica: Replica
    optimizer: torch.optim.Optimizer
    scaler: LossScale
    average: dict[str, Tensor]
    meter: Meter
    skips: Skips
    stop_vote: StopVote
    step: int = 0
    data: DataState | None = None
    """This rank's, after the last step of this call."""
    best: dict[str, Any] | None = None
    writer: CheckpointWriter | None = None
    """On the first rank, unless the run keeps nothing."""


def start_state(run: Run, resume: Snapshot | None) -> State:
    """Build what changes; with a snapshot, put back all of it."""
    samples = samples_per_step(run.training, run.facts)
    check_distribution(run.distributed, run.training, run.optimizer, samples, run.world.size)
    if run.logging.activation_norms and run.training.compile:
        raise UserError(
            "logging.activation_norms looks between the layers, where a compiled model has nothing to look at; "
            "switch it off, or training.compile",
            EXIT_USAGE,
        )
    model = run.model.to(run.world.device).train()
    if resume is not None:
        load_model_tensors(model, resume.model, "the checkpoint")
    if run.training.compile:
        # In place, so that parameter names keep no wrapper prefix.
        model.compile()
    replica = replicate(model, run.world, run.distributed)
    state = State(
        replica=replica,
        optimizer=build_optimizer(run.optimizer, model, replica.shares.own if replica.shares else None),
        scaler=LossScale(run.training.precision, run.world.device),
        average=start_average(model) if run.training.ema_decay else {},
        meter=Meter(run.world),
        skips=Skips(run.world),
        stop_vote=StopVote(run.world),
    )
    if resume is not None:
        _restore(run, state, resume)
    return state


def _restore(run: Run, state: State, resume: Snapshot) -> None:
    trainer = resume.trainer
    if not resume.optimizer and not resume.starts_optimizer_anew and trainer["step"] < run.training.max_steps:
        raise UserError(
            f"the checkpoint of step {trainer['step']} holds no optimizer state, because the run has "
            "checkpoint.save_optimizer = false: it cannot go on; start a new run"
        )
    check_bits_of_tree(trainer.get("tree", {}), bits_of_tree(run.distributed, run.training))
    load_optimizer_tensors(state.optimizer, state.replica.module, resume.optimizer)
    for name in [name for name in state.average if name in resume.average]:  # in one order on all ranks
        state.average[name].copy_(cut_like(resume.average[name], state.average[name]))
    state.step, state.best = trainer["step"], trainer["best"] or None
    state.scaler.load_state_dict(trainer["scaler"])
    state.meter.load_totals(trainer["open_metrics"])
    state.meter.smoothed_loss.load_state(trainer.get("smoothed_loss", {}))
    state.skips.load_state(trainer.get("skips", {}))


@contextmanager
def evaluation_mode(state: State) -> Generator[None]:
    """The averaged weights, where kept, and no dropout."""
    model = state.replica.module.eval()
    with averaged_weights(model, state.average) if state.average else nullcontext(), state.replica.by_itself():
        yield
    model.train()
