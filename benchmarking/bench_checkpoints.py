"""What saving costs a run: how long the loop stands still, written beside the training or before it goes on.

    uv run python -m benchmarking.bench_checkpoints

A model of 1.6 million parameters with AdamW trains on one thread. First single saves: the time until `save` returns,
and until the checkpoint is on the disk. Then stretches of training, each 50 times as long as a write, in turn: without
saving, with one save in the background, with one that the loop waits for. Each is compared to the two without a save
that lie around it; A/A compares one of these two to the mean of its own neighbours. Medians are printed, and one JSON
line last. The beginning of a stretch, three times a write long, is timed by itself too: there the copy and the writing
beside the training happen, and a difference in it is a far smaller part of the noise of a whole stretch.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trainkit.checkpoint_writer import CheckpointWriter
from trainkit.checkpoints import CheckpointStore, Snapshot, model_tensors, snapshot_bytes
from trainkit.optimizers import build_optimizer, optimizer_tensors
from trainkit.specs import AdamWSpec, CheckpointSpec

WIDTH, LAYERS, ROWS = 512, 6, 128
INTERVAL = 50
"""Length of a stretch, in durations of a write."""
BEGINNING = 3
"""Length of its beginning."""
ROUNDS = 15
KINDS = ("never", "background", "never", "waiting")


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

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def snapshot(self, step: int) -> Snapshot:
        optimizer = optimizer_tensors(self.optimizer, self.model)
        return Snapshot({"step": step}, model_tensors(self.model), optimizer)


def single_save(training: Training, writer: CheckpointWriter, step: int) -> tuple[float, float]:
    """Seconds until the loop may go on, and until the checkpoint is on the disk; after some steps, as in a run."""
    training.steps(20)
    start = time.perf_counter()
    writer.save(training.snapshot(step))
    blocked = time.perf_counter() - start
    writer.wait()
    return blocked, time.perf_counter() - start


@dataclass(frozen=True)
class Stretch:
    """Seconds of a stretch of training."""

    beginning: float
    whole: float


def run_stretch(training: Training, writer: CheckpointWriter, kind: str, step: int, counts: tuple[int, int]) -> Stretch:
    """`counts`: steps of the beginning, and of the rest."""
    start = time.perf_counter()
    if kind != "never":
        writer.save(training.snapshot(step))
    if kind == "waiting":
        writer.wait()
    training.steps(counts[0])
    beginning = time.perf_counter() - start
    training.steps(counts[1])
    return Stretch(beginning, time.perf_counter() - start)


def costs(stretches: list[Stretch], turn: int) -> tuple[list[float], list[float]]:
    """Of the stretches at `turn` in each round but the first and the last: shares of a stretch's time that its
    beginning, and all of it, took longer."""
    # Those with a save lie between two without; those without are compared to the next of their kind.
    distance = 2 if KINDS[turn] == "never" else 1
    beginnings: list[float] = []
    wholes: list[float] = []
    for index in range(len(KINDS) + turn, len(KINDS) * (ROUNDS + 1), len(KINDS)):
        now, around = stretches[index], (stretches[index - distance], stretches[index + distance])
        quiet = statistics.mean(x.whole for x in around)
        beginnings.append((now.beginning - statistics.mean(x.beginning for x in around)) / quiet)
        wholes.append(now.whole / quiet - 1)
    return beginnings, wholes


def main() -> None:
    torch.set_num_threads(1)
    training = Training()
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), CheckpointSpec(keep_last=2))
        with CheckpointWriter(store) as writer:
            times = [single_save(training, writer, step) for step in range(1, 10)][1:]
            blocked, whole = (statistics.median(column) for column in zip(*times, strict=True))
            start = time.perf_counter()
            training.steps(20)
            step_seconds = (time.perf_counter() - start) / 20
            beginning = round(BEGINNING * whole / step_seconds)
            counts = (beginning, round(INTERVAL * whole / step_seconds) - beginning)
            stretches = [
                run_stretch(training, writer, KINDS[number % len(KINDS)], 100 + number, counts)
                for number in range((ROUNDS + 2) * len(KINDS))
            ]
    size = snapshot_bytes(training.snapshot(0)) / 2**20
    print(f"checkpoint of {size:.0f} MiB, a step takes {step_seconds * 1e3:.1f} ms, a save every {sum(counts)} steps")
    print(
        f"  a save takes {whole * 1e3:.0f} ms; the loop stands still for {blocked * 1e3:.0f} ms, {blocked / whole:.0%}"
    )
    print(f"  longer by, median of {ROUNDS}      by the beginning    all of it (quartiles)")
    result = {"mib": size, "blocked_s": blocked, "save_s": whole}
    for name, kind in (("A/A", "never"), ("background", "background"), ("waiting", "waiting")):
        beginnings, wholes = costs(stretches, KINDS.index(kind))
        low, middle, high = statistics.quantiles(wholes, n=4)
        print(f"  {name:<30} {statistics.median(beginnings):+11.2%} {middle:+15.2%} ({low:+.2%} to {high:+.2%})")
        result |= {f"{name} beginning": statistics.median(beginnings), name: middle}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
