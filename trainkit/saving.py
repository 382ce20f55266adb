"""Checkpoints of a run that goes on: the state is copied here, and written by a `CheckpointWriter`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from trainkit.checkpoint_writer import CheckpointWriter
from trainkit.checkpoints import CheckpointStore, Snapshot, model_tensors, non_finite_tensors
from trainkit.disk_space import check_checkpoint_places, estimate_checkpoint_bytes
from trainkit.distribution import any_rank, gather_over_ranks, main_first
from trainkit.meter import Totals
from trainkit.optimizers import optimizer_tensors
from trainkit.ramps import units_before
from trainkit.replicas import bits_of_tree
from trainkit.run import Run
from trainkit.state import State


@contextmanager
def writing(run: Run, state: State) -> Generator[None]:
    """Within the block `state.writer` saves in the background; when it ends, all is on the disk."""
    store = run.checkpoints
    if store is None:
        yield
        return
    size = estimate_checkpoint_bytes(state.replica.module, state.average)
    warning = main_first(lambda: check_checkpoint_places(store, size), run.world)
    if warning:
        run.log.message(warning, state.step)
    if not run.world.is_main:
        yield
        return
    try:
        with CheckpointWriter(store) as state.writer:
            yield
    finally:
        tell(run, state)


def tell(run: Run, state: State) -> None:
    """What happened to the checkpoints meanwhile."""
    for text in state.writer.messages() if state.writer else ():
        run.log.message(text, state.step)


def save(run: Run, store: CheckpointStore, state: State, open_metrics: Totals, *, is_stopping: bool) -> bool:
    """Hand the state to the writer, from the first rank. False, on all ranks, when it is not fit to be kept."""
    run.watchdog.enter("save", state.step)
    data_states = gather_over_ranks(state.data, run.world)
    model = state.replica.module
    # A run that was asked to stop will resume, whatever it keeps otherwise.
    keeps_optimizer = store.spec.save_optimizer or is_stopping
    optimizer = state.replica.collect(optimizer_tensors(state.optimizer, model)) if keeps_optimizer else {}
    weights, average = (state.replica.collect_weights(part) for part in (model_tensors(model), state.average))
    bad: list[str] = []
    if state.writer is not None:
        trainer = {
            "step": state.step,
            "samples": units_before(run.training, state.step) // run.facts.units_per_sample,
            "data": data_states,
            "best": state.best or {},
            "max_steps": run.training.max_steps,
            "scaler": state.scaler.state_dict(),
            "skips": state.skips.state(),
            "tree": bits_of_tree(run.distributed, run.training),
            "open_metrics": open_metrics,
            "smoothed_loss": state.meter.smoothed_loss.state(),
            "log_offset": run.log.offset,
            "loggers": dict(run.log.loggers),
        }
        snapshot = Snapshot(trainer, weights, optimizer, average)
        bad = non_finite_tensors(snapshot)
        if bad:
            run.log.message(
                f"stopped at step {state.step}: {bad[0]} holds an infinity or a NaN; nothing of it was saved, "
                "the newest checkpoint is from before; lower optimizer.learning_rate or look at the data",
                state.step,
            )
        else:
            state.writer.save(snapshot)
    return not any_rank(bool(bad), run.world)
