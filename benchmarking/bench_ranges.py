"""What the names on timelines cost while nobody looks: nanoseconds a range, and the share of a training step.

    uv run python -m benchmarking.bench_ranges

Processor time of one thread, of a training step (forward, backward, update) of a small Transformer; every place that
names a range is counted, whatever its level. Medians of interleaved rounds, and one JSON line last.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from profiling import nvtx
from profiling.specs import Level
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec

ROUNDS, LOOPS = 9, 100_000
SPEC = TransformerSpec(num_layers=4, d_model=128, num_heads=2, context_length=128)
OF_THE_LOOP = 6
"""`data`, `step`, `transfer`, `forward`, `backward` and `optimizer`."""


def empty() -> None:
    for _ in range(LOOPS):
        pass


def switched_off() -> None:
    for _ in range(LOOPS):
        with nvtx.range("name", "verbose"):
            pass


def measured(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def training_step() -> Callable[[], None]:
    model = create_model(SPEC, vocab_size=1000)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(4, SPEC.context_length, dtype=torch.int64)

    def step() -> None:
        model(tokens).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_ranges(step: Callable[[], None]) -> int:
    """How many the model asks for in one step."""
    asked: list[str] = []
    real = nvtx.range

    def counted(name: str, level: Level = "coarse") -> AbstractContextManager[object]:
        asked.append(name)
        return real(name, level)

    nvtx.range = counted
    step()
    nvtx.range = real
    return len(asked)


def main() -> None:
    assert nvtx.range("a") is nvtx.range("b"), "this measures ranges that are off: unset TRANSFORMERLM_NVTX"
    torch.set_num_threads(1)
    step = training_step()
    count = count_ranges(step) + OF_THE_LOOP
    rounds = [(measured(switched_off) - measured(empty), measured(step)) for _ in range(ROUNDS)]
    off = statistics.median(pair[0] for pair in rounds) / LOOPS
    whole = statistics.median(pair[1] for pair in rounds)
    print(f"{off * 1e9:.0f} ns a range that is off; {count} of them in a step of {whole * 1e3:.1f} ms", end=": ")
    print(f"{count * off / whole:.6%} of its processor time")
    print(
        json.dumps(
            {"off_ns": off * 1e9, "ranges_per_step": count, "step_ms": whole * 1e3, "share": count * off / whole}
        )
    )


if __name__ == "__main__":
    main()
