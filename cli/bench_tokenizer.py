"""`transformerlm-bench-tokenizer`: the tokenizer beside every installed peer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cli.common import Command, run_command
from config.loading import Loaded
from config.schemas import BenchTokenizerConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[BenchTokenizerConfig], arguments: argparse.Namespace) -> None:
    from benchmarking.bench_tokenizer import benchmark

    benchmark(loaded.config.benchmark)


COMMAND = Command(
    name="transformerlm-bench-tokenizer",
    summary="Speed, memory and start-up of the tokenizer beside tiktoken, tokenizers, gigatoken, rustbpe and "
    "sentencepiece, where they are installed: the same texts in turns, ids compared, ratios printed, JSON last.",
    schema=BenchTokenizerConfig,
    default_config="bench_tokenizer",
    run=run,
    examples=("", "'benchmark.files=[\"corpus.txt\"]' benchmark.megabytes=20", "benchmark.tokenizer=data/tokenizer"),
    useful=("benchmark.files", "benchmark.megabytes", "benchmark.tokenizer"),
)


if __name__ == "__main__":
    raise SystemExit(main())
