"""docs/inference.md names every setting, and what it shows works."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from cli import bench_infer, infer
from tests.models.checkpoints import write_checkpoint
from transformerlm.inference.specs import InferenceSpec, UnmaskingOrder
from transformerlm.models.specs import Reading

TEXT = (Path(__file__).parents[2] / "docs" / "inference.md").read_text(encoding="utf-8")
COMMANDS = {"transformerlm-infer": infer.main, "transformerlm-bench-infer": bench_infer.main}
QUICK = ["benchmark.batch_sizes=[1]", "benchmark.repeats=1", "benchmark.warmups=0", "benchmark.samples=2"]


def parts(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, reading in {
        "quickstart": Reading(),
        "quickstart_dual": Reading(modes=("ar", "diffusion")),
        "blocks": Reading(modes=("diffusion",), alignment="in_place", block_size=4),
    }.items():
        write_checkpoint(Path("runs") / name, 1, reading=reading)


def test_every_setting_and_every_order_is_named() -> None:
    for name in [*(field.name for field in fields(InferenceSpec)), *get_args(UnmaskingOrder)]:
        assert f"`{name}`" in TEXT or f'`"{name}"`' in TEXT, name


def test_what_is_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec("\n".join(parts("python")), {})
    assert capsys.readouterr().out.startswith("0 [")


@pytest.mark.parametrize("line", [line for part in parts("bash") for line in part.splitlines()])
def test_what_is_a_command_runs(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line.startswith("uv run ")
    name, *arguments = shlex.split(line.removeprefix("uv run "))
    extra = QUICK if name == "transformerlm-bench-infer" else []
    assert COMMANDS[name]([*arguments, "--device=cpu", *extra]) == 0
    assert capsys.readouterr().out
