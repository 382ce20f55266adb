"""The runs in a folder, with state and last step: `python scripts/list_runs.py [FOLDER]`. Needs nothing but Python."""

from __future__ import annotations

import fcntl
import json
import sys
import time
from pathlib import Path
from typing import Any

TAIL = 1 << 16
"""Bytes at the end of `metrics.jsonl` that hold the last record."""


def main(folder: Path) -> int:
    runs = sorted(path.parent for path in folder.glob("*/config.json")) if folder.is_dir() else []
    if not runs:
        print(f"no runs in {folder}", file=sys.stderr)
        return 0
    rows = [("run", "state", "step", "of", "seconds ago"), *(describe(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def describe(run: Path) -> tuple[str, str, str, str, str]:
    status = read(run / "status.json")
    state = status.get("status", "unknown")
    if state == "running" and not is_held(run):
        state = "killed"
    of = read(run / "config.json").get("training", {}).get("max_steps", "?")
    return run.name, state, str(max(status.get("step", 0), last_step(run))), str(of), age(run, status)


def is_held(run: Path) -> bool:
    """Whether a process trains in the run: it locks the directory, and the lock goes with it however it ends."""
    try:
        with (run / ".lock").open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def last_step(run: Path) -> int:
    """Of the newest record; `status.json` is written when a run begins and ends."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # a line that is being written, or a record without a step
            continue
    return 0


def age(run: Path, status: dict[str, Any]) -> str:
    times = [path.stat().st_mtime for name in ("metrics.jsonl", "status.json") if (path := run / name).exists()]
    return f"{time.time() - max(times, default=status.get('time', time.time())):.0f}"


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs")))
