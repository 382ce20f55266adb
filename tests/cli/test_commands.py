"""What holds for every console script, whatever it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from config.schemas import COMMANDS

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
HEAVY = ("torch", "numpy", "datasets", "rich", "numba", "matplotlib", "wandb")


def run_script(name: str, *argv: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script as its installed launcher runs it; stderr ends with the heavy modules that it loaded."""
    module, function = SCRIPTS[name].split(":")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from {module} import {function} as main\n"
        f"sys.argv = [{name!r}, *{list(argv)!r}]\n"
        "code = main()\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_every_configured_command_is_a_script() -> None:
    assert set(COMMANDS) <= set(SCRIPTS)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_and_print_config_load_nothing_heavy_and_touch_nothing(name: str, tmp_path: Path) -> None:
    for argument, start in (("--help", f"usage: {name} "), ("--print-config", "[")):
        done = run_script(name, argument, folder=tmp_path)
        assert (done.returncode, done.stderr.split()) == (0, [])
        assert done.stdout.startswith(start)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_an_unknown_setting_is_one_line_and_exit_code_2(name: str, tmp_path: Path) -> None:
    done = run_script(name, "zzz.yyy=1", folder=tmp_path)
    (line, _) = done.stderr.split("\n", 1)
    assert done.returncode == 2 and line.startswith(f"{name}: zzz.yyy: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_script_runs_as_a_module(name: str, tmp_path: Path) -> None:
    module = SCRIPTS[name].partition(":")[0]
    done = subprocess.run([sys.executable, "-m", module, "--print-config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[")
