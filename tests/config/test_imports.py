from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numpy", "datasets", "rich", "numba", "matplotlib", "wandb", "tensorboard", "safetensors")
SPECS = (
    "trainkit.specs",
    "trainkit.data.specs",
    "transformerlm.models.specs",
    "transformerlm.objectives.specs",
    "transformerlm.inference.specs",
    "transformerlm.evaluation.specs",
    "transformerlm.tokenizer.specs",
)
CONFIG = ("config", "config.loading", "config.rendering", "config.schemas", "cli.common")


def first_import_that_loads(libraries: tuple[str, ...], modules: tuple[str, ...]) -> str:
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        f"    loaded = [name for name in {libraries!r} if name in sys.modules]\n"
        "    if loaded: sys.exit(print(module, 'loads', *loaded))"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_configuration_and_specs_load_nothing_heavy() -> None:
    assert first_import_that_loads(HEAVY, (*SPECS, *CONFIG)) == ""


def test_specs_need_neither_pydantic_nor_argparse() -> None:
    assert first_import_that_loads(("pydantic", "argparse"), SPECS) == ""
