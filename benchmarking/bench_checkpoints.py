"""What saving costs a run: how long the loop stands still, written beside the training or before it goes on.

    uv run python -m benchmarking.bench_checkpoints

A model of 1.6 million parameters with AdamW trains on one thread. First single saves: the time until `save`
returns, and until the checkpoint is on the disk. Then three runs of the same number of steps, in turn: without saving,
saving in the background, and saving while the loop waits, with 50 times the duration of a write between two saves.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from trainkit.checkpoint_writer import CheckpointWriter
from trainkit.checkpoints import CheckpointStore, Snapshot, model_tensors, snapshot_bytes
from trainkit.optimizers import build_optimizer, optimizer_tensors
from trainkit.specs import AdamWSpec, CheckpointSpec

WIDTH, LAYERS, ROWS = 512, 6, 128
SAVES_PER_RUN = 2
INTERVAL = 50
"""Duration of the interval between two saves, in durations of a write."""


class Training:
    """A stand-in for the loop: forward, backward, update."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.optimizer = build_optimizer(AdamWSpec(), self.model)
        self.batch = torch.randn(ROWS, WIDTH)
        self.step()

    def step(self) -> None:
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def snapshot(self, step: int) -> Snapshot:
        optimizer = optimizer_tensors(self.optimizer, self.model)
        return Snapshot({"step": step}, model_tensors(self.model), optimizer)


def single_save(training: Training, writer: CheckpointWriter, step: int) -> tuple[float, float]:
    """Seconds until the loop may go on, and until the checkpoint is on the disk; after some steps, as in a run."""
    for _ in range(20):
        training.step()
    start = time.perf_counter()
    writer.save(training.snapshot(step))
    blocked = time.perf_counter() - start
    writer.wait()
    return blocked, time.perf_counter() - start


def run_seconds(training: Training, steps: int, every: int, store: CheckpointStore, *, waits: bool) -> float:
    """A run that saves every so many steps (0 = never), up to the last checkpoint on the disk."""
    start = time.perf_counter()
    with CheckpointWriter(store) as writer:
        for step in range(1, steps + 1):
            training.step()
            if every and step % every == 0 and step < steps:
                writer.save(training.snapshot(step))
                if waits:
                    writer.wait()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    training = Training()
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), CheckpointSpec(keep_last=2))
        with CheckpointWriter(store) as writer:
            times = [single_save(training, writer, step) for step in range(1, 7)][1:]
        blocked, whole = (statistics.median(column) for column in zip(*times, strict=True))
        start = time.perf_counter()
        for _ in range(20):
            training.step()
        step_seconds = (time.perf_counter() - start) / 20
        every = round(INTERVAL * whole / step_seconds)
        steps = every * SAVES_PER_RUN + every // 2
        seconds = {
            name: run_seconds(training, steps, interval, store, waits=waits)
            for name, interval, waits in (
                ("never", 0, False),
                ("background", every, False),
                ("waiting", every, True),
                ("never again", 0, False),
            )
        }
    size = snapshot_bytes(training.snapshot(0)) / 2**20
    base = (seconds["never"] + seconds["never again"]) / 2
    print(f"checkpoint of {size:.0f} MiB, a step takes {step_seconds * 1e3:.0f} ms, a save every {every} steps")
    print(
        f"  a save takes {whole * 1e3:.0f} ms; the loop stands still for {blocked * 1e3:.0f} ms, {blocked / whole:.0%}"
    )
    for name, value in seconds.items():
        print(f"  {name:<12} {value:6.1f} s  {value / base - 1:+.2%}")
    print(json.dumps({"mib": size, "blocked_s": blocked, "save_s": whole, **seconds}))


if __name__ == "__main__":
    main()
