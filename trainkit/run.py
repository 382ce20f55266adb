"""What a run is made of, and what comes of it: the words that the loop and its parts share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from profiling.recorder import Recorder
from trainkit.checkpoints import CheckpointStore
from trainkit.distribution import World
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.specs import DistributedSpec, LoggingSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from trainkit.step import StepSums
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
    def message(self, text: str, step: int) -> None:
        """Tell people something, after so many steps."""
        ...

    @property
    def offset(self) -> int:
        """Bytes of `metrics.jsonl` so far."""
        ...

    @property
    def loggers(self) -> Mapping[str, Any]:
        """JSON for a checkpoint: under which names other services know this run, so that it goes on there."""
        ...


Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
"""Called on all ranks with the plain model (averaged weights inside, where kept) and the step."""

Inspect = Callable[[int, Sequence[Batch], StepSums, Callable[[Tensor], Tensor]], None]
"""Called on all ranks in each step, between its gradient and its update, while `.grad` holds the step's sum: with the
number of the step (from 1), this rank's micro-batches and sums, and what undoes the loss scale of `fp16` (a norm or a
gradient in, the same of the loss itself out)."""


Prepare = Callable[[Batch, int], Batch]
"""What a task needs done to a batch, given the step (from 0) that it belongs to."""


def _as_it_is(batch: Batch, step: int) -> Batch:
    del step
    return batch


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
    logging: LoggingSpec = field(default_factory=LoggingSpec)
    """What the loop measures for the log; where that goes is `log`'s affair."""
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
    recorder: Recorder = field(default_factory=Recorder)
    """Writes down how long what takes, in a window of steps."""
    inspect: Inspect | None = None
    """Sees every gradient; changes nothing."""
    prepare: Prepare = _as_it_is
    """Applied to every micro-batch, on the CPU, before it is weighed and moved to the device."""
    prefetch: int = 0
    """Steps that a thread reads and prepares ahead of the loop; 0 = none, and no thread."""


@dataclass(frozen=True)
class Result:
    status: Status
    step: int
    """Optimizer steps done, over all attempts."""
    best: dict[str, Any]
    """`{"step": …, "value": …}` of the best validation; empty when there was none."""
    checkpoint: Path | None
    """The newest one written by this call."""


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
