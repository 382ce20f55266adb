"""What docs/profiling.md and the README show of profiling: the names, the commands, the Python."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from profiling import nvtx
from profiling.specs import ProfilingSpec
from tests.models.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = [path for room in ("trainkit", "transformerlm") for path in sorted((ROOT / room).rglob("*.py"))]


def rows(text: str) -> dict[str, str]:
    """Of the table of ranges: each name and its level."""
    table = text[text.index("| level | range |") :].split("\n\n")[0]
    levels: dict[str, str] = {}
    level = ""
    for line in table.splitlines()[2:]:
        first, names, _ = (cell.strip() for cell in line.strip("|").split(" |", 2))
        level = first.strip("`") or level
        levels |= {name: level for name in re.findall(r"`(\w+)`", names)}
    return levels


def test_the_table_is_the_one_of_the_module_and_of_the_code() -> None:
    table = PAGE[PAGE.index("| level | range |") :].split("\n\n")[0]
    assert table in (nvtx.__doc__ or "")
    used = {
        name: match[2] or "coarse"
        for path in SOURCES
        for match in re.finditer(r"nvtx\.range\(([^()]*?)(?:, \"(fine|verbose)\")?\)", path.read_text(encoding="utf-8"))
        for name in re.findall(r'"(\w+)"', match[1])
    }
    assert used == rows(PAGE)


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


NSYS_LINES = [line for text in (README, PAGE) for line in shell_lines(text) if "nsys profile" in line]


@pytest.mark.parametrize("line", NSYS_LINES)
def test_what_comes_after_nsys_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """nsys itself need not be here: what it would start is a command, and the ranges would be on."""
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text('[tokenizer]\npath = "t"\n[data]\nmegatron_train_prefix = "d"\n')
    before, after = line.split("uv run transformerlm-")
    variables = dict(word.split("=") for word in before.split() if word.startswith("TRANSFORMERLM_"))
    assert "nsys profile -o " in before
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert nvtx._rank_of_environment() == nvtx._RANK[variables.get("TRANSFORMERLM_NVTX_LEVEL", "coarse")]
    command, *words = shlex.split(after)
    assert importlib.import_module(f"cli.{command}").main([*words, "--print-config"]) == 0


def test_what_is_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "runs" / "quickstart", 1)
    decoding, memory = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(decoding.replace("total_length=64", "total_length=40"), {})
    printed = capsys.readouterr().out
    assert "decode" in printed and "mixing" in (tmp_path / "decoding.json").read_text()
    exec(memory, {})
    assert (tmp_path / "alloc_history.json").exists() is torch.cuda.is_available()


def test_every_setting_is_named() -> None:
    for name in (field.name for field in fields(ProfilingSpec)):
        assert f"| `profiling.{name}` |" in PAGE
