"""What the training loop costs over a hand-written one: on a null model, and on one of 17 million parameters.

    uv run python -m benchmarking.bench_loop

The null model is one number, so that a step is nearly nothing but the loop: microseconds per step are printed, of the
wall clock and of the processor time of the thread that trains, which a busy machine distorts less. The large model is
an MLP: there the ratio of processor times counts, to the mean of the two hand-written runs around it, beside that of a
hand-written run to the two around that (A/A). All take turns, several times; medians are printed, and one JSON line
last.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.distribution import World
from trainkit.logging.run_log import open_run_log
from trainkit.loop import Run, train
from trainkit.specs import AdamWSpec, ConstantScheduleSpec, LoggingSpec, TrainingSpec
from trainkit.task import Batch, Loss

REPEATS = 9


class NullTask:
    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": batch["valid"].sum()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        total = model(batch["x"]).square().sum()
        return Loss(total / denominators["loss"], {"loss": (total.detach(), batch["valid"].sum())})


DEFAULT = LoggingSpec()


@dataclass(frozen=True)
class Seconds:
    """Per step."""

    wall: float
    thread: float
    """Processor time of the thread that trains."""


@dataclass(frozen=True)
class Workload:
    build: Callable[[], nn.Module]
    batch: Tensor
    steps: int


NULL = Workload(lambda: nn.Linear(1, 1), torch.ones(1, 1), 2000)
LARGE = Workload(
    lambda: nn.Sequential(
        *(layer for _ in range(4) for layer in (nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024)))
    ),
    torch.ones(64, 1024),
    27,
)


def our_loop(work: Workload, logging: LoggingSpec = DEFAULT) -> Seconds:
    """`trainkit.loop.train`, writing metrics, CSV, plots and JSON lines as it does by default."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        log = open_run_log(Path(folder), logging, total_steps=work.steps)
        source = FixedSource(work)
        rows = len(work.batch)
        train(
            Run(
                model=work.build(),
                task=NullTask(),
                source=source,
                training=TrainingSpec(
                    max_steps=work.steps, total_batch_size=rows, device_batch_size=rows, device="cpu"
                ),
                optimizer=AdamWSpec(),
                schedule=ConstantScheduleSpec(),
                world=World(rank=0, size=1, device=torch.device("cpu")),
                log=log,
                logging=logging,
            )
        )
        log.close()
    return source.per_step()


class FixedSource:
    """The same batch for ever; notes when the second step and the last one begin (the first follows a trial)."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._marks: list[tuple[float, float]] = []

    def steps(self, states: list[dict[str, Any]] | None) -> Generator[tuple[list[Batch], dict[str, Any]]]:
        rows = len(self._work.batch)
        batch = {"x": self._work.batch, "valid": torch.ones(rows, dtype=torch.bool)}
        for number in itertools.count():
            if number in (1, self._work.steps - 1):
                self._marks.append((time.perf_counter(), time.thread_time()))
            yield [batch], {}

    def per_step(self) -> Seconds:
        (wall, thread), (wall_end, thread_end) = self._marks
        steps = self._work.steps - 2
        return Seconds((wall_end - wall) / steps, (thread_end - thread) / steps)


def hand_written_loop(work: Workload) -> Seconds:
    """What one would write by hand: forward, backward, clip, update, a loss now and then."""
    model, lines = work.build(), io.StringIO()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    wall = thread = 0.0
    for step in range(work.steps):
        if step == 1:
            wall, thread = time.perf_counter(), time.thread_time()
        loss = model(work.batch).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9:
            print(step, loss.item(), file=lines)
    steps = work.steps - 1
    return Seconds((time.perf_counter() - wall) / steps, (time.thread_time() - thread) / steps)


def null_model() -> dict[str, float]:
    pairs = [(our_loop(NULL), hand_written_loop(NULL)) for _ in range(REPEATS + 1)][1:]
    print(f"{NULL.steps} steps of a null model, median of {REPEATS} interleaved runs, one thread; µs a step")
    result: dict[str, float] = {}
    for kind in ("wall", "thread"):
        ours, by_hand = (statistics.median(getattr(pair[i], kind) for pair in pairs) * 1e6 for i in (0, 1))
        print(f"  {kind:7} trainkit {ours:7.1f}  by hand {by_hand:7.1f}  overhead {ours - by_hand:7.1f}")
        result |= {f"{kind}_ours_us": ours, f"{kind}_hand_us": by_hand}
    return result


def large_model() -> dict[str, float]:
    norms = LoggingSpec(norms_every=1)
    both = LoggingSpec(norms_every=1, activation_norms=True)
    rounds = [
        {
            "before": hand_written_loop(LARGE),
            "trainkit": our_loop(LARGE),
            "between": hand_written_loop(LARGE),
            "with norms at every step": our_loop(LARGE, norms),
            "and activations": our_loop(LARGE, both),
            "after": hand_written_loop(LARGE),
        }
        for _ in range(REPEATS)
    ]
    size = sum(p.numel() for p in LARGE.build().parameters())
    print(
        f"{LARGE.steps} steps of {size / 1e6:.1f}M parameters, {REPEATS} rounds;"
        " processor time over that by hand, median (range)"
    )
    around = {
        "between": ("before", "after"),
        "trainkit": ("before", "between"),
        "with norms at every step": ("between", "after"),
        "and activations": ("between", "after"),
    }
    result: dict[str, float] = {}
    for name, by_hand in around.items():
        ratios = sorted(times[name].thread / statistics.mean(times[i].thread for i in by_hand) for times in rounds)
        median, label = statistics.median(ratios), "A/A" if name == "between" else name
        print(f"  {label:26} {median:.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        result[label] = median
    return result


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(null_model() | large_model()))


if __name__ == "__main__":
    main()
