"""Settings of a recorded window of a run, as a frozen dataclass that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

Level = Literal["coarse", "fine", "verbose"]
"""How much of a run has names on a timeline; `profiling.nvtx` says which."""


@dataclass(frozen=True, kw_only=True)
class ProfilingSpec:
    """A timeline of a few steps, and the history of GPU memory, written below the run's folder in `profile/`."""

    steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps to record with PyTorch's profiler; 0 = none. A few are enough: some megabytes each."""
    start_step: Annotated[int, Ge(1)] = 10
    """Number of the first step to record. The first steps of a run, which compile and allocate, are not typical."""
    level: Level = "fine"
    """Which names stand in the timeline: `coarse`, the phases of a step; `fine`, also the parts of the model;
    `verbose`, also each layer."""
    ranks: Literal["first", "all"] = "first"
    """Which processes record, each into a file of its own."""
    memory_history: Annotated[int, Ge(0)] = 0
    """How many of the latest CUDA allocations to write down, with the stacks that made them, at the end of the window
    or, with `steps = 0`, of the run (also when it ends because memory ran out); 0 = none."""
