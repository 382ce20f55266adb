"""The training loop: one step at a time, on any number of ranks, resumable at every one of them.

Read `train` first; the functions below it are its sentences. The loop reads no clock and no random number that could
change a result, and it never waits for the device between two log steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from profiling import nvtx
from trainkit.averaging import averaged_weights, start_average, update_average
from trainkit.checkpoint_writer import CheckpointWriter
from trainkit.checkpoints import CheckpointStore, Snapshot, load_model_tensors, model_tensors, non_finite_tensors
from trainkit.disk_space import check_checkpoint_places, estimate_checkpoint_bytes
from trainkit.distribution import StopVote, World, any_rank, gather_over_ranks, main_first
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.fully_sharded import cut_like
from trainkit.meter import Meter, Totals, means
from trainkit.optimizers import (
    build_optimizer,
    clip_and_update,
    learning_rates,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from trainkit.precision import LossScale, autocast_context
from trainkit.preflight import describe, estimate_run
from trainkit.ramps import ramped, units_before
from trainkit.replicas import Replica, bits_of_tree, check_bits_of_tree, check_distribution, replicate
from trainkit.schedules import learning_rate_factor
from trainkit.skips import Skips
from trainkit.specs import DistributedSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from trainkit.step import StepSums, accumulate_gradients
from trainkit.task import Batch, RunFacts, Task
from trainkit.watchdog import Watchdog

DataState = dict[str, Any]
Status = Literal["finished", "preempted", "non-finite"]


class Source(Protocol):
    """Training data as an iterator that carries its state."""

    def steps(self, states: list[DataState] | None) -> Generator[tuple[list[Batch], DataState]]:
        """Yield, for ever, this rank's micro-batches of the next step and this rank's JSON state after it.

        `None` starts from the beginning. A checkpoint records the states of all ranks, in their order, of the last step
        *trained*, however far the source has read ahead; every rank resumes from the whole list, however many ranks
        there are by then. Closing the generator stops whatever it started.
        """
        ...


class Log(Protocol):
    """Where records go; `trainkit.logging` has the real one."""

    def write(self, record: Mapping[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    @property
    def offset(self) -> int:
        """Bytes of `metrics.jsonl` so far."""
        ...


Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
"""Called on all ranks with the plain model (averaged weights inside, where kept) and the step."""


Inspect = Callable[[int, Sequence[Batch], StepSums, Callable[[Tensor], Tensor]], None]
"""Called on all ranks in each step, between its gradient and its update, while `.grad` holds the step's sum: with the
number of the step (from 1), this rank's micro-batches and sums, and what undoes the loss scale of `fp16` (a norm or a
gradient in, the same of the loss itself out)."""


@dataclass(frozen=True)
class Run:
    """All that the loop needs, composed by the caller."""

    model: nn.Module
    task: Task
    source: Source
    training: TrainingSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    world: World
    log: Log
    distributed: DistributedSpec = field(default_factory=DistributedSpec)
    facts: RunFacts = field(default_factory=RunFacts)
    checkpoints: CheckpointStore | None = None
    evaluate: Evaluate | None = None
    best_metric: str = "val_loss"
    """Which value of `evaluate` decides about the best checkpoint; lower is better."""
    sample: Callable[[nn.Module, int], None] | None = None
    stop_requested: Callable[[], bool] = lambda: False
    """Polled once a step, on every rank; when any says so, all save and stop."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    """Told what the loop is doing."""
    inspect: Inspect | None = None
    """Sees every gradient; changes nothing."""


@dataclass(frozen=True)
class Result:
    status: Status
    step: int
    """Optimizer steps done, over all attempts."""
    best: dict[str, Any]
    """`{"step": …, "value": …}` of the best validation; empty when there was none."""
    checkpoint: Path | None
    """The newest one written by this call."""


@dataclass
class _State:
    """What changes while training."""

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


def train(run: Run, resume: Snapshot | None = None) -> Result:
    """Train to `max_steps`, or until asked to stop, or until the numbers stop being finite."""
    with run.watchdog.watching():
        state = _start(run, resume)
        status: Status = "finished"
        if state.step < run.training.max_steps:
            with closing(run.source.steps(resume.trainer["data"] if resume else None)) as steps, _writing(run, state):
                steps = ramped(steps, run.training, state.step)
                first = next(steps)
                _announce(run, state, first[0])
                status = _run_steps(run, state, _marked(chain([first], steps)))
                state.stop_vote.close()
                run.watchdog.enter("finish", state.step)
    return Result(status, state.step, state.best or {}, state.writer.newest if state.writer else None)


def _marked(steps: Iterator[tuple[list[Batch], DataState]]) -> Iterator[tuple[list[Batch], DataState]]:
    """The same steps; the time that each is waited for shows in a profile."""
    while True:
        with nvtx.range("data"):
            step = next(steps)
        yield step


def _run_steps(run: Run, state: _State, steps: Iterable[tuple[list[Batch], DataState]]) -> Status:
    """Step, and after each step whatever is due: record, validate, sample, save, stop."""
    training = run.training
    validates = run.evaluate is not None and not training.skip_validation
    clock = _Clock(run, state.step)
    phase = "first step"
    for micro_batches, data_state in steps:
        run.watchdog.enter(phase, state.step)
        phase = "step"
        _take_step(run, state, micro_batches)
        state.step, state.data = state.step + 1, data_state

        is_last = state.step == training.max_steps
        is_stopping = state.stop_vote.ask(run.stop_requested()) and not is_last
        logs = _due(state, training.log_every, is_last)
        evaluates = validates and _due(state, training.eval_every, is_last)
        samples = _due(state, training.sample_every, is_last)
        saves = _due(state, training.save_every, is_last or is_stopping)
        if not (logs or evaluates or samples or saves):
            run.watchdog.enter("data", state.step)
            continue
        # The device is waited for here, and only here.
        totals = state.meter.totals()
        if _gives_up(run, state):
            return "non-finite"
        if logs:
            _tell(run, state)
            run.log.write(_training_record(run, state, means(totals), clock))
            state.meter.clear()
            totals = {}
        if evaluates and _validate(run, state, clock):
            saves = True
        if samples:
            with clock.paused():
                _sample(run, state)
        if saves and run.checkpoints is not None:
            with clock.paused():
                if not _save(run, run.checkpoints, state, totals, is_stopping=is_stopping):
                    return "non-finite"
        if is_stopping:
            return "preempted"
        if is_last:
            break
        run.watchdog.enter("data", state.step)
    return "finished"


def samples_per_step(training: TrainingSpec, facts: RunFacts) -> int:
    """B, the rows of one optimizer step over all ranks."""
    samples, rest = divmod(training.total_batch_size, facts.units_per_sample)
    if rest or not samples:
        raise UserError(
            f"training.total_batch_size = {training.total_batch_size} is not a multiple of the "
            f"{facts.units_per_sample} {facts.unit_name} of one sample; choose a multiple",
            EXIT_USAGE,
        )
    return samples


def _start(run: Run, resume: Snapshot | None) -> _State:
    """Build what changes; with a snapshot, put back all of it."""
    samples = samples_per_step(run.training, run.facts)
    check_distribution(run.distributed, run.training, run.optimizer, samples, run.world.size)
    model = run.model.to(run.world.device).train()
    if resume is not None:
        load_model_tensors(model, resume.model, "the checkpoint")
    if run.training.compile:
        # In place, so that parameter names keep no wrapper prefix.
        model.compile()
    replica = replicate(model, run.world, run.distributed)
    state = _State(
        replica=replica,
        optimizer=build_optimizer(run.optimizer, model, replica.shares.own if replica.shares else None),
        scaler=LossScale(run.training.precision, run.world.device),
        average=start_average(model) if run.training.ema_decay else {},
        meter=Meter(run.world),
        skips=Skips(run.world, run.log.message),
        stop_vote=StopVote(run.world),
    )
    if resume is not None:
        trainer = resume.trainer
        if not resume.optimizer and not resume.starts_optimizer_anew and trainer["step"] < run.training.max_steps:
            raise UserError(
                f"the checkpoint of step {trainer['step']} holds no optimizer state, because the run has "
                "checkpoint.save_optimizer = false: it cannot go on; start a new run"
            )
        check_bits_of_tree(trainer.get("tree", {}), bits_of_tree(run.distributed, run.training))
        load_optimizer_tensors(state.optimizer, model, resume.optimizer)
        for name in [name for name in state.average if name in resume.average]:  # in one order on all ranks
            state.average[name].copy_(cut_like(resume.average[name], state.average[name]))
        state.step, state.best = trainer["step"], trainer["best"] or None
        state.scaler.load_state_dict(trainer["scaler"])
        state.meter.load_totals(trainer["open_metrics"])
        state.skips.load_state(trainer.get("skips", {}))
    return state


def _announce(run: Run, state: _State, micro_batches: list[Batch]) -> None:
    """Say what the run will cost, from a trial of its first micro-batch."""
    done, next_done, all_done = (
        units_before(run.training, step) for step in (state.step, state.step + 1, run.training.max_steps)
    )
    units, units_per_step = all_done - done, next_done - done
    estimate = estimate_run(
        state.replica,
        run.task,
        [_to_device(batch, run.world.device) for batch in micro_batches],
        run.world,
        steps=units // units_per_step,
        units_per_step=units_per_step,
        autocast=_autocast(run),
    )
    run.log.message(describe(estimate, run.facts, run.world))


def _autocast(run: Run) -> Callable[[], AbstractContextManager[object]]:
    return partial(autocast_context, run.training.precision, run.world.device)


def _take_step(run: Run, state: _State, micro_batches: list[Batch]) -> None:
    """One optimizer step; the device may still be working on it when this returns."""
    training, device = run.training, run.world.device
    factor = learning_rate_factor(run.schedule, state.step, training.max_steps)
    set_learning_rate(state.optimizer, run.optimizer.learning_rate * factor)
    sums = accumulate_gradients(
        state.replica,
        run.task,
        [_to_device(batch, device) for batch in micro_batches],
        run.world,
        autocast=_autocast(run),
        scale=state.scaler.scale,
    )
    if run.inspect is not None:
        run.inspect(state.step + 1, micro_batches, sums, state.scaler.unscale)
    with nvtx.range("optimizer"):
        model = state.replica.module
        norm, skip = clip_and_update(state.optimizer, model, clip=training.gradient_clip, scale=state.scaler)
        state.replica.after_update()
        is_blameless = state.scaler.blames(skip)
        state.scaler.update(skip)
    if training.ema_decay:
        update_average(state.average, model, training.ema_decay, state.step + 1, skip)
    state.meter.add(sums, norm, skip)
    state.skips.add(state.step, skip, is_blameless, sums.is_finite, micro_batches)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _due(state: _State, every: int, regardless: bool) -> bool:
    return regardless or (every > 0 and state.step % every == 0)


def _gives_up(run: Run, state: _State) -> bool:
    """Whether too many steps in a row changed nothing, because their numbers were not finite."""
    state.skips.read()
    if state.skips.most_in_a_row < run.training.max_skipped_steps:
        return False
    run.log.message(
        f"stopped at step {state.step}: {state.skips.most_in_a_row} steps in a row had an infinite or NaN loss or "
        "gradient and changed nothing; the newest checkpoint is from before; lower optimizer.learning_rate or look at "
        "the data"
    )
    return True


def _training_record(run: Run, state: _State, metrics: Mapping[str, float], clock: _Clock) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": "train", "step": state.step, **metrics}
    record |= learning_rates(state.optimizer)
    record[f"{run.facts.unit_name}_seen"] = units_before(run.training, state.step)
    return record | clock.read(state.step)


def _validate(run: Run, state: _State, clock: _Clock) -> bool:
    """Evaluate, record it, and say whether this is the best so far."""
    assert run.evaluate is not None
    run.watchdog.enter("evaluate", state.step)
    with clock.paused(), _evaluation_mode(state), nvtx.range("evaluate"):
        values = dict(run.evaluate(state.replica.module, state.step))
    run.log.write({"kind": "eval", "step": state.step, **values})
    value = values.get(run.best_metric)
    if value is None or not math.isfinite(value) or (state.best is not None and value >= state.best["value"]):
        return False
    state.best = {"step": state.step, "value": value, "metric": run.best_metric}
    return True


def _sample(run: Run, state: _State) -> None:
    run.watchdog.enter("sample", state.step)
    if run.sample is not None:
        with _evaluation_mode(state):
            run.sample(state.replica.module, state.step)
    any_rank(False, run.world)  # the others wait here, where the watchdog knows why


@contextmanager
def _evaluation_mode(state: _State) -> Generator[None]:
    """The averaged weights, where kept, and no dropout."""
    model = state.replica.module.eval()
    with averaged_weights(model, state.average) if state.average else nullcontext(), state.replica.by_itself():
        yield
    model.train()


@contextmanager
def _writing(run: Run, state: _State) -> Generator[None]:
    """Within the block `state.writer` saves in the background; when it ends, all is on the disk."""
    store = run.checkpoints
    if store is None:
        yield
        return
    size = estimate_checkpoint_bytes(state.replica.module, state.average)
    warning = main_first(lambda: check_checkpoint_places(store, size), run.world)
    if warning:
        run.log.message(warning)
    if not run.world.is_main:
        yield
        return
    try:
        with CheckpointWriter(store) as state.writer:
            yield
    finally:
        _tell(run, state)


def _tell(run: Run, state: _State) -> None:
    """What happened to the checkpoints meanwhile."""
    for text in state.writer.messages() if state.writer else ():
        run.log.message(text)


def _save(run: Run, store: CheckpointStore, state: _State, open_metrics: Totals, *, is_stopping: bool) -> bool:
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
            "log_offset": run.log.offset,
        }
        with nvtx.range("save"):
            snapshot = Snapshot(trainer, weights, optimizer, average)
            bad = non_finite_tensors(snapshot)
            if bad:
                run.log.message(
                    f"stopped at step {state.step}: {bad[0]} holds an infinity or a NaN; nothing of it was saved, "
                    "the newest checkpoint is from before; lower optimizer.learning_rate or look at the data"
                )
            else:
                state.writer.save(snapshot)
    return not any_rank(bool(bad), run.world)


class _Clock:
    """Throughput between records, without the time that evaluation and saving took."""

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        self._step = step
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Generator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float]:
        """Seconds per step and units per second since the last call; then start over."""
        now = time.perf_counter()
        steps, seconds = step - self._step, max(now - self._since, 1e-9)
        units = (units_before(self._run.training, step) - units_before(self._run.training, self._step)) / seconds
        self._step, self._since = step, now
        values = {"step_seconds": seconds / steps, f"{self._run.facts.unit_name}_per_second": units}
        if self._run.facts.flops_per_unit:
            values["flops_per_second"] = units * self._run.facts.flops_per_unit
        return values
