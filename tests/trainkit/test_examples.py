"""The example trains with `trainkit` alone: whatever else this repository holds cannot be imported there."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mlp.py"
BLOCKED = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformerlm", "config", "cli", "benchmarking", "pydantic", "datasets"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import transformerlm
except ImportError:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def records_of(output: str, folder: Path) -> list[dict[str, Any]]:
    """What the example said, which is what it recorded last."""
    lines = output.splitlines()
    assert lines == (folder / "metrics.jsonl").read_text().splitlines()[-len(lines) :]
    return [json.loads(line) for line in lines]


def test_an_mlp_on_numbers_learns_and_knows_that_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-W", "error", "-c", BLOCKED, str(EXAMPLE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    records = records_of(done.stdout, tmp_path)
    validations = [record["val_loss"] for record in records if record["kind"] == "eval"]
    assert len(validations) == 4 and validations[-1] < 0.02 and validations[-1] < validations[0]
    norms = [record for record in records if record["kind"] == "norms"]
    assert [record["step"] for record in norms] == [100, 200, 300, 400]
    assert norms[-1].keys() > {"gradient_norm/0", "weight_norm/2", "update_ratio"}
    assert (tmp_path / "plots" / "loss.png").exists() and (tmp_path / "metrics.csv").exists()

    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    output, error = capsys.readouterr()
    assert error == ""
    assert [record["kind"] for record in records_of(output, tmp_path)] == ["message"]  # nothing is left to do
