"""How fast a run is, how long it waits for its data, how much of the processor it uses, and how much memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from profiling import nvtx
from trainkit.ramps import units_before
from trainkit.run import Run

T = TypeVar("T")

PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit multiplications and additions per second, from the manufacturer's data sheets (without sparsity, sums in
32 bits); the first name that occurs in the device's counts."""


class Clock:
    """Throughput between records, without the time that evaluation and saving took."""

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        self._step = step
        self._since = time.perf_counter()
        self._waited = 0.0
        self._peak = peak_flops(run.world.device) * run.world.size

    def timed(self, steps: Iterator[T]) -> Generator[T]:
        """The same steps; the time that each is waited for counts, and shows in a profile."""
        while True:
            start = time.perf_counter()
            with nvtx.range("data"):
                step = next(steps)
            self._waited += time.perf_counter() - start
            yield step

    @contextmanager
    def paused(self) -> Generator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self, step: int) -> dict[str, float]:
        """Means since the last call, for a record; then start over.

        `data_wait_fraction` is the share of the time in which the loop waited for its source; `mfu` the share of the
        devices' peak (where `PEAKS` knows it) that the model's own operations make up (arXiv:2204.02311, appendix B).
        """
        now = time.perf_counter()
        steps, seconds = step - self._step, max(now - self._since, 1e-9)
        facts, training = self._run.facts, self._run.training
        units = (units_before(training, step) - units_before(training, self._step)) / seconds
        values = {
            "step_seconds": seconds / steps,
            f"{facts.unit_name}_per_second": units,
            "data_wait_fraction": self._waited / seconds,
            "memory_bytes": peak_memory(self._run.world.device),
        }
        if facts.flops_per_unit:
            values["flops_per_second"] = units * facts.flops_per_unit
            if self._peak:
                values["mfu"] = values["flops_per_second"] / self._peak
        self._step, self._since, self._waited = step, now, 0.0
        return values


def peak_flops(device: torch.device) -> float:
    """Of one device; 0 = unknown."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
