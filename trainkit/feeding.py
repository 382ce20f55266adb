"""From a run's source to the steps that its loop takes: grown, prepared, and read ahead."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from trainkit.data.prefetch import prefetch
from trainkit.ramps import ramped
from trainkit.run import DataState, Run
from trainkit.task import Batch

FedStep = tuple[list[Batch], DataState]
"""This rank's micro-batches of a step, and the source's state after it."""


def feed(run: Run, states: list[DataState] | None, first_step: int) -> Generator[FedStep]:
    """The run's steps from `first_step` (0-based) on.

    All of it happens in a thread that is ahead by `run.prefetch` steps. Closing the generator closes the source.
    """
    return prefetch(_prepared(run, states, first_step), run.prefetch)


def _prepared(run: Run, states: list[DataState] | None, first_step: int) -> Generator[FedStep]:
    with closing(run.source.steps(states)) as source:
        for step, (batches, state) in enumerate(ramped(source, run.training, first_step), first_step):
            yield [run.prepare(batch, step) for batch in batches], state
