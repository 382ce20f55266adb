"""The training loop: one step at a time, on any number of ranks, resumable at every one of them.

Read `train` first; the functions below it, and the modules beside this one, are its sentences. The loop reads no clock
and no random number that could change a result, and it never waits for the device between two log steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from itertools import chain

from profiling import nvtx
from trainkit.checkpoints import Snapshot
from trainkit.distribution import any_rank
from trainkit.feeding import FedStep, feed
from trainkit.norms import LayerNorms, Probe
from trainkit.reporting import announce, gives_up, training_record
from trainkit.run import DataState, Log, Result, Run, Source, Status
from trainkit.saving import save, tell, writing
from trainkit.state import State, evaluation_mode, start_state
from trainkit.throughput import Clock
from trainkit.update import take_step

__all__ = ["DataState", "Log", "Result", "Run", "Source", "train"]

_NO_PROBE = Probe()


def train(run: Run, resume: Snapshot | None = None) -> Result:
    """Train to `max_steps`, or until asked to stop, or until the numbers stop being finite."""
    with run.watchdog.watching():
        state = start_state(run, resume)
        status: Status = "finished"
        if state.step < run.training.max_steps:
            data_states = resume.trainer["data"] if resume else None
            with closing(feed(run, data_states, state.step)) as steps, writing(run, state), run.recorder:
                first = next(steps)
                with nvtx.range("trial"):
                    announce(run, state, first[0])
                status = _run_steps(run, state, chain([first], steps))
                state.stop_vote.close()
                run.watchdog.enter("finish", state.step)
    return Result(status, state.step, state.best or {}, state.writer.newest if state.writer else None)


def _run_steps(run: Run, state: State, steps: Iterator[FedStep]) -> Status:
    """Step, and after each step whatever is due: record, measure, validate, sample, save, stop."""
    training = run.training
    validates = run.evaluate is not None and not training.skip_validation
    clock = Clock(run, state.step)
    phase = "first step"
    for micro_batches, data_state in run.recorder.over(clock.timed(steps), state.step):
        run.watchdog.enter(phase, state.step)
        phase = "step"
        norms = _norms_of_this_step(run, state)
        with nvtx.range("step"):
            take_step(run, state, micro_batches, norms or _NO_PROBE)
        state.step, state.data = state.step + 1, data_state

        is_last = state.step == training.max_steps
        is_stopping = state.stop_vote.ask(run.stop_requested()) and not is_last
        logs = _due(state, training.log_every, is_last)
        evaluates = validates and _due(state, training.eval_every, is_last)
        samples = _due(state, training.sample_every, is_last)
        saves = _due(state, training.save_every, is_last or is_stopping)
        if not (logs or norms or evaluates or samples or saves):
            run.watchdog.enter("data", state.step)
            continue
        # The device is waited for here, and only here.
        totals = state.meter.totals()
        if gives_up(run, state):
            return "non-finite"
        if logs:
            tell(run, state)
            run.log.write(training_record(run, state, totals, clock))
            state.meter.clear()
            totals = {}
        if norms:
            run.log.write({"kind": "norms", "step": state.step, **norms.read()})
        if evaluates and _validate(run, state, clock):
            saves = True
        if samples:
            with clock.paused(), nvtx.range("sample"):
                _sample(run, state)
        if saves and run.checkpoints is not None:
            with clock.paused(), nvtx.range("save"):
                if not save(run, run.checkpoints, state, totals, is_stopping=is_stopping):
                    return "non-finite"
        if is_stopping:
            return "preempted"
        if is_last:
            break
        run.watchdog.enter("data", state.step)
    return "finished"


def _norms_of_this_step(run: Run, state: State) -> LayerNorms | None:
    every = run.logging.norms_every
    if not every or (state.step + 1) % every:
        return None
    return LayerNorms(state.replica.module, run.world, activations=run.logging.activation_norms)


def _due(state: State, every: int, regardless: bool) -> bool:
    return regardless or (every > 0 and state.step % every == 0)


def _validate(run: Run, state: State, clock: Clock) -> bool:
    """Evaluate, record it, and say whether this is the best so far."""
    assert run.evaluate is not None
    run.watchdog.enter("evaluate", state.step)
    with clock.paused(), evaluation_mode(state), nvtx.range("evaluate"):
        values = dict(run.evaluate(state.replica.module, state.step))
    run.log.write({"kind": "eval", "step": state.step, **values})
    value = values.get(run.best_metric)
    if value is None or not math.isfinite(value) or (state.best is not None and value >= state.best["value"]):
        return False
    state.best = {"step": state.step, "value": value, "metric": run.best_metric}
    return True


def _sample(run: Run, state: State) -> None:
    run.watchdog.enter("sample", state.step)
    with evaluation_mode(state):  # on all ranks: they make a sharded model whole together
        if run.sample is not None:
            run.sample(state.replica.module, state.step)
    any_rank(False, run.world)  # the others wait here, where the watchdog knows why
