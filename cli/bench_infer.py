"""`transformerlm-bench-infer`: next-token decoding beside the ways of diffusion."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cli.common import Command, run_command
from config.loading import Loaded
from config.schemas import BenchInferConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[BenchInferConfig], arguments: argparse.Namespace) -> None:
    from benchmarking.bench_infer_latency import benchmark

    benchmark(loaded.config.benchmark, loaded.config.model)


COMMAND = Command(
    name="transformerlm-bench-infer",
    summary="Next-token decoding beside the ways of diffusion, on the same weights: latency of the first token and of "
    "the whole text, tokens a second, passes a token, memory, for batches of several sizes; and what speed does to the "
    "texts. Tables, JSON last.",
    schema=BenchInferConfig,
    default_config="bench_infer",
    run=run,
    examples=(
        "",
        "--ckpt runs/dual benchmark.judge=runs/ar",
        "'benchmark.decodings=[\"ar\", \"steps\"]' 'benchmark.batch_sizes=[1, 32]' model.d_model=384",
    ),
    useful=(
        "benchmark.checkpoint",
        "benchmark.judge",
        "benchmark.decodings",
        "benchmark.batch_sizes",
        "benchmark.length",
        "benchmark.repeats",
        "model.num_layers",
    ),
    flags={
        "--ckpt": "benchmark.checkpoint",
        "--checkpoint": "benchmark.checkpoint",
        "--device": "benchmark.device",
        "--seed": "benchmark.seed",
    },
)


if __name__ == "__main__":
    raise SystemExit(main())
