"""A window of a run's steps on PyTorch's profiler, and the history of CUDA memory: what `[profiling]` asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from profiling import memory, nvtx
from profiling.specs import ProfilingSpec

T = TypeVar("T")

OPERATIONS = 30
"""Rows of the table of operations."""


class Recorder:
    """Stands around the steps of a loop, and does nothing at all where nothing is asked for:

        with recorder:
            for batch in recorder.over(batches, steps_done):
                …

    It writes into `directory`, and calls `tell` with a sentence about it and the number of the step:

    | file | |
    |---|---|
    | `step-00000010-rank-0.json` | the timeline from that step on, for https://ui.perfetto.dev |
    | `step-00000010-rank-0.txt` | the operations that took longest |
    | `step-00000010-rank-0.pickle` | memory, for https://pytorch.org/memory_viz |
    """

    def __init__(
        self,
        spec: ProfilingSpec | None = None,
        directory: Path | str = "profile",
        *,
        rank: int = 0,
        tell: Callable[[str, int], object] = lambda text, step: print(text),
    ) -> None:
        self._spec = spec or ProfilingSpec()
        self._directory = Path(directory)
        self._rank = rank
        self._tell = tell
        self._is_recording = False
        self._first = self._number = 0
        self._profile: torch.profiler.profile | None = None
        self._names = ExitStack()

    def over(self, steps: Iterator[T], done: int) -> Iterator[T]:
        """The same steps, after `done` earlier ones. The record of a step begins where the step is waited for."""
        spec = self._spec
        is_wanted = (spec.steps or spec.memory_history) and (spec.ranks == "all" or self._rank == 0)
        return self._recorded(steps, done + 1) if is_wanted else steps

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The window ends with the run: what there is of it is written, above all when memory ran out."""
        if self._is_recording:
            self._finish()

    def _recorded(self, steps: Iterator[T], number: int) -> Iterator[T]:
        spec = self._spec
        start, end = (spec.start_step, spec.start_step + spec.steps) if spec.steps else (number, float("inf"))
        if number >= end:
            self._tell(
                f"nothing is profiled: the window begins at profiling.start_step = {start} and is over, the run goes "
                f"on at step {number}",
                number - 1,
            )
        self._pass(number, start, end)
        for step in steps:
            yield step
            number += 1
            self._pass(number, start, end)

    def _pass(self, number: int, start: float, end: float) -> None:
        """Step `number` comes next."""
        if not self._is_recording and start <= number < end:
            self._begin(number)
        elif self._is_recording and number >= end:
            self._finish()
        self._number = number

    def _begin(self, number: int) -> None:
        self._is_recording, self._first, self._number = True, number, number
        if self._spec.memory_history and not memory.start_history(max_entries=self._spec.memory_history):
            self._tell("profiling.memory_history: there is no CUDA device, and no history of its memory", number - 1)
        if self._spec.steps:
            _wait_for_device()  # for what earlier steps have left to it
            # Else its library reports its own stages and the GPU that a CPU lacks; read at its first use.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self._profile = torch.profiler.profile()
            self._profile.start()
            self._names.enter_context(nvtx.traced(self._spec.level))

    def _finish(self) -> None:
        self._is_recording = False
        base = self._directory / f"step-{self._first:08d}-rank-{self._rank}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if self._profile is not None:
                self._write_profile(self._profile, base)
            if self._spec.memory_history:
                self._write_memory(base.with_suffix(".pickle"))
        except (OSError, RuntimeError) as error:  # a full disk ends no run
            self._tell(f"the profile {base} cannot be written: {error}", self._number)

    def _write_profile(self, profile: torch.profiler.profile, base: Path) -> None:
        self._names.close()
        _wait_for_device()
        profile.stop()
        self._profile = None
        timeline, table = base.with_suffix(".json"), base.with_suffix(".txt")
        _publish(timeline, profile.export_chrome_trace)
        _publish(table, lambda path: Path(path).write_text(_operations(profile), encoding="utf-8"))
        self._tell(
            f"profile of {self._steps}: open {timeline} at https://ui.perfetto.dev, or read {table}", self._number
        )

    def _write_memory(self, path: Path) -> None:
        if torch.cuda.is_available():
            _publish(path, memory.dump_snapshot)
            memory.start_history(False)
            self._tell(f"memory of {self._steps}: open {path} at https://pytorch.org/memory_viz", self._number)

    @property
    def _steps(self) -> str:
        return f"steps {self._first} to {self._number}"


def _operations(profile: torch.profiler.profile) -> str:
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=OPERATIONS) + "\n"


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _publish(path: Path, write: Callable[[str], object]) -> None:
    """Under another name first: whoever sees `path` sees all of it."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(str(temporary))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
