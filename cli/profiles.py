"""The README's table of profiles: what each takes, on the hardware it is meant for (see `cli.estimates`).

    uv run python -m cli.profiles
    uv run python -m cli.profiles --write README.md     # between the marks in that file

Any profile, hardware and setting can be asked for:

    uv run python -m cli.profiles runpod_2b --gpu H100 --gpus 8 training.device_batch_size=8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cli.estimates import Hardware, count_parameters, estimate_memory, run_tokens, tokens_per_second
from cli.marks import write_between_marks
from config import problems
from config.loading import load, shipped
from config.schemas import PipelineConfig
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.throughput import PEAKS

MARKS = "profiles"
GIB = 2**30
HEADER = "| Profile | On | Parameters | Memory of each GPU | Tokens per second | A run | Takes | |\n" + "|---" * 8 + "|"


@dataclass(frozen=True)
class Row:
    profile: str
    hardware: Hardware
    note: str = ""
    utilisation: float = 0.4
    """Share of the GPUs' peak that matrices get."""


A100 = Hardware(label="A100 80 GB", gpu="A100", memory_gib=80)
FOUR_A100 = Hardware(label="4 × A100 80 GB", gpu="A100", memory_gib=80, gpus=4)
EIGHT_A100 = Hardware(label="8 × A100 80 GB", gpu="A100", memory_gib=80, gpus=8)
ROWS = (
    Row(
        "m3_medium",
        Hardware(label="a small GPU (L4)", gpu="L4", memory_gib=24),
        "for a laptop, too, with patience: try everything with it before renting",
        utilisation=0.2,  # narrow matrices
    ),
    Row("runpod_1b", A100, "the first one to rent for"),
    Row("runpod_2b", A100, "twice the time and twice the bytes of a checkpoint (24 GB)"),
    Row("runpod_2b", FOUR_A100, "the optimizer's state divided (`zero1`)"),
    Row("runpod_4b", A100, "just fits, with activations computed twice: to rehearse"),
    Row("runpod_4b", EIGHT_A100, "weights and optimizer divided (`fsdp`)"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    names = sorted({row.profile for row in ROWS})
    parser.add_argument("profile", nargs="?", choices=names, help="one of them; the README's table unless given")
    parser.add_argument("settings", nargs="*", metavar="table.key=value", help="changes to it")
    parser.add_argument("--gpu", default="A100", choices=sorted(PEAKS), help="kind of GPU (A100)")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them (1)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of their peak that matrices get (0.4)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between its marks in a file")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.profile:
            many = f"{arguments.gpus} × " if arguments.gpus > 1 else ""
            asked = Hardware(f"{many}{arguments.gpu}", arguments.gpu, memory_gib=0, gpus=arguments.gpus)
            text = table([Row(arguments.profile, asked, utilisation=arguments.utilisation)], arguments.settings)
        else:
            text = table(ROWS)
        if arguments.write:
            write_between_marks(arguments.write, MARKS, text)
    except ValidationError as error:
        parser.exit(EXIT_USAGE, "\n".join([*problems.lines(error), ""]))
    except UserError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print(text)
    return 0


def table(rows: Sequence[Row], settings: Sequence[str] = ()) -> str:
    return "\n".join([HEADER, *(_line(row, settings) for row in rows)])


def _line(row: Row, settings: Sequence[str]) -> str:
    config = load(PipelineConfig, shipped(row.profile), settings).config
    vocab_size, hardware = config.tokenizer.vocab_size, row.hardware
    memory = estimate_memory(config, vocab_size, hardware.gpus)
    speed = tokens_per_second(config, vocab_size, hardware, row.utilisation)
    tokens = run_tokens(config)
    cells = (
        f"`{row.profile}`",
        hardware.label,
        _short(count_parameters(config, vocab_size)),
        f"{memory.peak / GIB:.1f} GiB, of which {memory.held / GIB:.1f} always",
        f"{speed:,.0f} at {row.utilisation:.0%}",
        f"{_short(tokens)} tokens",
        _duration(tokens / speed),
        row.note,
    )
    return f"| {' | '.join(cells)} |"


def _short(number: int) -> str:
    """Three digits and a letter."""
    for letter, unit in (("B", 10**9), ("M", 10**6)):
        if number >= unit:
            return f"{number / unit:#.3g}".rstrip(".") + letter
    return f"{number:,}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 100:
        return f"{minutes:.0f} minutes"
    return f"{hours:.0f} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:.0f} days)"


if __name__ == "__main__":
    raise SystemExit(main())
