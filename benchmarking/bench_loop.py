"""What the training loop costs: the same null model in our loop, with default logging, and in a hand-written one.

    uv run python -m benchmarking.bench_loop

The model is one number, so that a step is nearly nothing but the loop. Both run in turn, several times; the medians,
their difference per step and the ratio are printed, and one JSON line last.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.distribution import World
from trainkit.logging.run_log import open_run_log
from trainkit.loop import Run, train
from trainkit.specs import AdamWSpec, ConstantScheduleSpec, LoggingSpec, TrainingSpec
from trainkit.task import Batch, Loss

STEPS = 2000
REPEATS = 5


class NullTask:
    def weights(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": batch["valid"].sum()}

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        total = model(batch["x"]).square().sum()
        return Loss(total / denominators["loss"], {"loss": (total.detach(), batch["valid"].sum())})


class NullSource:
    def steps(self, states: list[dict[str, Any]] | None) -> Generator[tuple[list[Batch], dict[str, Any]]]:
        batch = {"x": torch.ones(1, 1), "valid": torch.ones(1, dtype=torch.bool)}
        while True:
            yield [batch], {}


def our_loop() -> float:
    """Seconds per step of `trainkit.loop.train`, writing metrics, CSV, plots and JSON lines as it does by default."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        log = open_run_log(Path(folder), LoggingSpec(), total_steps=STEPS)
        run = Run(
            model=nn.Linear(1, 1),
            task=NullTask(),
            source=NullSource(),
            training=TrainingSpec(max_steps=STEPS, total_batch_size=1, device_batch_size=1, device="cpu"),
            optimizer=AdamWSpec(),
            schedule=ConstantScheduleSpec(),
            world=World(rank=0, size=1, device=torch.device("cpu")),
            log=log,
        )
        start = time.perf_counter()
        train(run)
        seconds = time.perf_counter() - start
        log.close()
    return seconds / STEPS


def hand_written_loop() -> float:
    """Seconds per step of what one would write by hand: forward, backward, clip, update, a loss now and then."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch, lines = torch.ones(1, 1), io.StringIO()
    start = time.perf_counter()
    for step in range(STEPS):
        loss = model(batch).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9:
            print(step, loss.item(), file=lines)
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    ours: list[float] = []
    by_hand: list[float] = []
    # The first call of each pays for imports and allocator warm-up.
    our_loop()
    hand_written_loop()
    for _ in range(REPEATS):
        ours.append(our_loop())
        by_hand.append(hand_written_loop())
    a, b = statistics.median(ours), statistics.median(by_hand)
    print(f"{STEPS} steps of a null model, median of {REPEATS} interleaved runs, one thread")
    print(f"  trainkit loop      {a * 1e6:8.1f} µs a step")
    print(f"  hand-written loop  {b * 1e6:8.1f} µs a step")
    print(f"  overhead           {(a - b) * 1e6:8.1f} µs a step, ratio {a / b:.2f}")
    print(json.dumps({"ours_us": a * 1e6, "hand_us": b * 1e6, "overhead_us": (a - b) * 1e6, "ratio": a / b}))


if __name__ == "__main__":
    main()
