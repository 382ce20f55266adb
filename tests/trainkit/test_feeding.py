"""Steps on their way to the loop: in order, prepared, and never left running."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest

from tests.trainkit.test_loop import ListLog, make_run
from trainkit.feeding import feed
from trainkit.run import DataState, Run
from trainkit.task import Batch


@dataclass
class Counted:
    """Steps 0, 1, … without end; says when it has been closed."""

    closed: list[bool] = field(default_factory=list[bool])

    def steps(self, states: list[DataState] | None) -> Generator[tuple[list[Batch], DataState]]:
        number = states[0]["next"] if states else 0
        try:
            while True:
                yield [{"number": number}, {"number": number}], {"next": number + 1}  # pyright: ignore
                number += 1
        finally:
            self.closed.append(True)


def double(batch: Batch, step: int) -> Batch:
    return {**batch, "step": step}  # pyright: ignore


@pytest.fixture(params=[0, 2])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    return make_run(tmp_path, ListLog(), source=Counted(), prefetch=request.param, prepare=double)


def test_each_batch_is_prepared_for_its_step(run: Run) -> None:
    steps = feed(run, [{"next": 5}], 5)
    assert list(islice(steps, 3)) == [
        ([{"number": n, "step": n}, {"number": n, "step": n}], {"next": n + 1}) for n in (5, 6, 7)
    ]
    steps.close()


def test_a_loop_that_stops_leaves_nothing_running(run: Run) -> None:
    steps = feed(run, None, 0)
    next(steps)
    steps.close()
    assert run.source.closed == [True]  # pyright: ignore
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_what_cannot_be_prepared_is_told_at_its_step(tmp_path: Path) -> None:
    def prepare(batch: Batch, step: int) -> Batch:
        if step == 3:
            raise ValueError("no such word")
        return batch

    for prefetch in (0, 2):
        source = Counted()
        steps = feed(make_run(tmp_path, ListLog(), source=source, prefetch=prefetch, prepare=prepare), None, 0)
        assert len(list(islice(steps, 3))) == 3
        with pytest.raises(ValueError, match="no such word"):
            next(steps)
        assert source.closed == [True]
