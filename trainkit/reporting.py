"""What the loop tells its log: the plan before the first step, training records, norms, and why it gives up."""

from __future__ import annotations

from typing import Any

from trainkit.meter import Totals, means
from trainkit.optimizers import learning_rates
from trainkit.preflight import describe, estimate_run
from trainkit.ramps import units_before
from trainkit.run import Run
from trainkit.state import State
from trainkit.task import Batch
from trainkit.throughput import Clock
from trainkit.update import autocast, to_device


def announce(run: Run, state: State, micro_batches: list[Batch]) -> None:
    """Say what the run will cost, from a trial of its first micro-batch."""
    done, next_done, all_done = (
        units_before(run.training, step) for step in (state.step, state.step + 1, run.training.max_steps)
    )
    units, units_per_step = all_done - done, next_done - done
    estimate = estimate_run(
        state.replica,
        run.task,
        [to_device(batch, run.world.device) for batch in micro_batches],
        run.world,
        steps=units // units_per_step,
        units_per_step=units_per_step,
        autocast=autocast(run),
    )
    run.log.message(describe(estimate, run.facts, run.world), state.step)


def training_record(run: Run, state: State, totals: Totals, clock: Clock) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": "train", "step": state.step, **means(totals)}
    record |= state.meter.smoothed_loss.values()
    record |= learning_rates(state.optimizer)
    record[f"{run.facts.unit_name}_seen"] = units_before(run.training, state.step)
    return record | clock.read(state.step)


def gives_up(run: Run, state: State) -> bool:
    """Whether too many steps in a row changed nothing, because their numbers were not finite."""
    for text in state.skips.read():
        run.log.message(text, state.step)
    if state.skips.most_in_a_row < run.training.max_skipped_steps:
        return False
    run.log.message(
        f"stopped at step {state.step}: {state.skips.most_in_a_row} steps in a row had an infinite or NaN loss or "
        "gradient and changed nothing; the newest checkpoint is from before; lower optimizer.learning_rate or look at "
        "the data",
        state.step,
    )
    return True
