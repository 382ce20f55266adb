from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "datasets", "rich", "numba", "matplotlib", "wandb", "tensorboard", "safetensors")


def loaded_heavy_modules(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "config.loading",
        "config.rendering",
        "config.schemas",
        "cli.common",
        "trainkit.specs",
        "trainkit.data.specs",
        "transformerlm.models.specs",
        "transformerlm.objectives.specs",
        "transformerlm.inference.specs",
        "transformerlm.evaluation.specs",
        "transformerlm.tokenizer.specs",
    ],
)
def test_configuration_and_specs_load_nothing_heavy(module: str) -> None:
    assert loaded_heavy_modules(f"import {module}") == []


@pytest.mark.parametrize("library", ["pydantic", "argparse"])
def test_specs_need_neither_pydantic_nor_argparse(library: str) -> None:
    specs = "trainkit.specs, trainkit.data.specs, transformerlm.models.specs, transformerlm.inference.specs"
    code = f"import sys, {specs}\nassert {library!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
