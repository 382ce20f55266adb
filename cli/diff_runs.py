"""`transformerlm-diff-runs`: where two runs begin to differ."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.common import Command, run_command
from config.loading import Loaded
from config.schemas import DiffRunsConfig
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE, UserError

if TYPE_CHECKING:
    from trainkit.comparing import Comparison
    from trainkit.logging.records import Scalar


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[DiffRunsConfig], arguments: argparse.Namespace) -> int:
    spec = loaded.config.runs
    if not (spec.first and spec.second):
        raise UserError(f"name the folders of two runs: {COMMAND.name} runs/one runs/other", EXIT_USAGE)
    from trainkit.comparing import as_json, compare_runs

    comparison = compare_runs(Path(spec.first), Path(spec.second), tensors=spec.tensors)
    print(json.dumps(as_json(comparison), indent=2, ensure_ascii=False) if arguments.json else table(comparison))
    return 0 if comparison.is_equal else EXIT_FAILURE


def table(comparison: Comparison) -> str:
    """The comparison for people: settings, records, tensors, and the verdict last."""
    lines = [f"{comparison.first} and {comparison.second}"]
    lines += _section("settings that decide about numbers:", comparison.settings)
    lines += _section("other settings:", comparison.harmless)
    lines += _section("environment:", comparison.environment)
    lines += ["", *(f"note: {note}" for note in comparison.notes)] if comparison.notes else []
    return "\n".join([*lines, "", _metric(comparison), _tensor(comparison), _verdict(comparison)])


def _section(title: str, changes: Mapping[str, str]) -> list[str]:
    width = max(map(len, changes), default=0)
    return ["", title, *(f"  {name:<{width}}  {change}" for name, change in changes.items())] if changes else []


def _metric(comparison: Comparison) -> str:
    found = comparison.metric
    if found is None:
        return f"records   {comparison.records} in common, all equal"
    return f"records   step {found.step}: {found.kind} {found.name} {_exact(found.first)} and {_exact(found.second)}"


def _exact(value: Scalar) -> str:
    return f"{value:.9g} ({value.hex()})" if isinstance(value, float) else str(value)


def _tensor(comparison: Comparison) -> str:
    steps = ", ".join(map(str, comparison.checkpoints))
    found = comparison.tensor
    if found is None:
        return f"tensors   checkpoints of steps {steps}: all equal" if steps else "tensors   not compared"
    return (
        f"tensors   step {found.step}: {found.tensors} of {found.of} differ; "
        f"the first is {found.part} {found.name}, which {found.what}"
    )


def _verdict(comparison: Comparison) -> str:
    if comparison.is_equal:
        return "equal in all that both have"
    if comparison.step is None:
        return "different settings; all numbers that both have are equal"
    before = [step for step in comparison.checkpoints if step < comparison.step]
    since = f" (checkpoints were still equal at step {before[-1]})" if before else ""
    return f"different: the first known difference is of step {comparison.step}{since}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", metavar="RUN", help="folders of the two runs")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _adapt(arguments: argparse.Namespace) -> None:
    if len(arguments.folders) > 2:
        raise UserError(f"two runs are compared, and {len(arguments.folders)} are named", EXIT_USAGE)
    named = zip(("first", "second"), arguments.folders, strict=False)
    arguments.assignments = [*arguments.assignments, *(f"runs.{name}={json.dumps(path)}" for name, path in named)]


COMMAND = Command(
    name="transformerlm-diff-runs",
    summary="Compare two runs and name the first step, metric and tensor that differ, to the bit: settings first, then "
    "the records of both, then the checkpoints of common steps. Exit code 0 where all that both have is equal, 1 where "
    "it is not, 2 where there is nothing to compare.",
    schema=DiffRunsConfig,
    default_config="diff_runs",
    run=run,
    examples=("runs/one runs/other", "runs/one runs/other --json", "runs/one runs/other runs.tensors=false"),
    useful=("runs.first", "runs.second", "runs.tensors"),
    add_arguments=_add_arguments,
    adapt=_adapt,
)


if __name__ == "__main__":
    raise SystemExit(main())
