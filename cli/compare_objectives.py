"""One table of runs by their likelihood on the same stories of the grammar, beside the grammar's own.

    uv run python -m cli.compare_objectives runs/quickstart runs/quickstart_diffusion runs/quickstart_dual
    uv run python -m cli.compare_objectives RUNS --write README.md     # between the marks in that file

Every way in which a run's model can be asked has a row: next tokens exactly; the bound over all orders of lifting
masks, with its error; one order, from left to right, exactly. The excess is the model's nats above the grammar's, of
the same stories, in pairs: no mean excess may lie more than three standard errors below zero.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.eval import Report, evaluate_checkpoint, measured
from cli.marks import marks, write_between_marks
from config.specs import CheckpointEvaluationSpec, GrammarEvaluationDataSpec
from trainkit.errors import UserError
from transformerlm.evaluation.specs import Method
from transformerlm.inference.specs import PrecisionName

MARKS = "objectives"
BEGIN, END = marks(MARKS)
LABELS: dict[str, str] = {"ar": "next tokens", "bound": "diffusion, bound", "left_to_right": "diffusion, left to right"}
METHODS: dict[str, tuple[Method, ...]] = {"ar": ("ar",), "diffusion": ("bound", "left_to_right")}
HEADER = "| Run | Asked for | Bits per byte | Excess over the grammar |\n|---|---|---|---|"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", help="run folders or checkpoints")
    parser.add_argument("--stories", type=int, default=100, help="held-out stories to score; default: %(default)s")
    parser.add_argument("--draws", type=int, default=32, help="noise levels of a bound; default: %(default)s, twice")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put the table between {BEGIN} and {END} of a file")
    arguments = parser.parse_args(argv)
    if min(arguments.stories, arguments.draws) < 1:
        parser.error("--stories and --draws must be at least 1")
    try:
        reports = [
            report
            for run in arguments.runs
            for report in score_run(run, arguments.stories, arguments.draws, arguments.precision)
        ]
        text = table(reports)
        if arguments.write:
            write_between_marks(arguments.write, MARKS, text)
    except UserError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print(text)
    print(json.dumps([vars(report) | {"grammar": vars(report.grammar)} for report in reports if report.grammar]))
    return 0


def score_run(run: str, stories: int, draws: int, precision: PrecisionName) -> list[Report]:
    """A report for each way in which the model can be asked."""
    from transformerlm.models.files import read_model_json, resolve_checkpoint

    _, reading, _ = read_model_json(resolve_checkpoint(run))
    methods: list[Method] = [method for mode in reading.modes for method in METHODS[mode]]
    data = GrammarEvaluationDataSpec(num_stories=stories)
    reports: list[Report] = []
    for method in methods:
        print(f"{run}: {LABELS[method]}, {stories} stories", file=sys.stderr, flush=True)
        spec = CheckpointEvaluationSpec(checkpoint=run, method=method, draws=draws, batch_size=32, precision=precision)
        reports.append(evaluate_checkpoint(spec, data))
    return reports


def table(reports: Sequence[Report]) -> str:
    """The reports as Markdown, the grammar first."""
    first = reports[0].grammar
    assert first is not None
    rows = [f"| the grammar itself | | {first.bits_per_byte:.4f} | |"]
    for report in reports:
        grammar = report.grammar
        assert grammar is not None
        name = Path(report.checkpoint).parent.parent.name
        bits_error = report.loss_error / report.loss * report.bits_per_byte
        bits = measured(report.bits_per_byte, bits_error or math.nan, ".4f")
        excess = measured(grammar.excess, grammar.excess_error, ".1%")
        rows.append(f"| `{name}` | {LABELS[report.method]} | {bits} | {excess} |")
    return "\n".join([HEADER, *rows])


if __name__ == "__main__":
    raise SystemExit(main())
