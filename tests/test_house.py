"""The house itself: light modules stay light, and the wheel works where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SPECS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("transformerlm", "trainkit")
    for path in (ROOT / package).rglob("specs.py")
)
HEAVY = ("torch", "numpy", "datasets", "rich", "matplotlib", "numba", "safetensors", "tensorboard", "wandb")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_specs_are_found() -> None:
    assert {"trainkit.specs", "transformerlm.models.specs"} <= set(SPECS)


@pytest.mark.parametrize(
    "module",
    ["config", "config.schemas", "config.loading", "cli.common", "trainkit", "transformerlm", "profiling", *SPECS],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    assert not loaded_after(f"import {module}") & set(HEAVY)


def test_libraries_load_no_pydantic() -> None:
    modules = "trainkit.loop, trainkit.checkpoints, transformerlm.models.build, transformerlm.inference.predictor"
    assert "pydantic" not in loaded_after(f"import {modules}")


def test_inference_loads_no_training_kit() -> None:
    code = (
        "import sys, transformerlm.inference.predictor; print(*(n for n in sys.modules if n.startswith('trainkit.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {f"trainkit.{leaf}" for leaf in ("task", "random", "artifacts", "errors")}


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(tmp_path: Path) -> None:
    """Build it, install it into an empty folder, and use its scripts and resources from there."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the PATH")
    run = {"check": True, "capture_output": True, "text": True}
    subprocess.run([uv, "build", "--wheel", "--out-dir", tmp_path / "dist", ROOT], **run)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    place = tmp_path / "site"
    subprocess.run([uv, "pip", "install", "--no-deps", "--target", place, "--python", sys.executable, wheel], **run)
    environment = os.environ | {"PYTHONPATH": str(place)}
    code = "import cli.common, config.loading as c; print(cli.common.__file__, c.shipped('quickstart'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, **run).stdout.split()
    assert all(path.startswith(str(place)) for path in found) and Path(found[1]).is_file()
    for script in PROJECT["scripts"]:
        for arguments in (["--help"], ["--print-config"]):
            done = subprocess.run([place / "bin" / script, *arguments], cwd=tmp_path, env=environment, **run)
            assert done.stdout.strip(), f"{script} {arguments}"
