"""The steps of docs/extending.md, followed to the letter in a copy of the packages, give a model that trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.conftest import TINY_CORPUS, TINY_MODEL, TINY_RUN
from tests.docs.documents import ROOT, Block, blocks, commands

DOCUMENT = "docs/extending.md"
PACKAGES = ("transformerlm", "trainkit", "config", "cli", "profiling")


def follow(block: Block, folder: Path) -> None:
    match block.language:
        case "python" | "toml":
            first, text = block.text.split("\n", 1)
            path = folder / first.removeprefix("# ")
            assert not path.exists(), block
            path.write_text(text)
        case "diff":
            first, text = block.text.split("\n", 1)
            apply(text, folder / first.removeprefix("--- "), block)
        case language:
            assert language == "bash", block


def apply(text: str, path: Path, block: Block) -> None:
    lines = text.rstrip("\n").split("\n")
    old, new = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
    content = path.read_text()
    assert old in content, f"{block}: {path.name} does not hold\n{old}"
    path.write_text(content.replace(old, new))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks(DOCUMENT):
        follow(block, tmp_path)
    return tmp_path


def test_the_steps_fit_the_code(copy: Path) -> None:
    """Quickly: the new kind is known to the configuration, and its files are Python."""
    done = run(copy, "transformerlm-train", "--explain", "model.num_layers")
    assert '[model] kind = "parallel": The decoder with attention and feed-forward layer side by side.' in done
    for path in ("transformerlm/models/parallel.py", "transformerlm/models/build.py"):
        compile((copy / path).read_text(), path, "exec")


@pytest.mark.slow
def test_the_steps_work(copy: Path) -> None:
    for shown in commands(DOCUMENT):
        program, *words = shown.words
        if program == "transformerlm-pipeline":
            words += ["tokenizer.vocab_size=300", *TINY_CORPUS, *TINY_MODEL, *TINY_RUN]
        if program == "transformerlm-infer":
            words += ["inference.total_length=24", "--device=cpu"]
        if program != "python":
            assert run(copy, program, *words)
    (described,) = (copy / "runs" / "parallel" / "checkpoints").glob("step-*2/model.json")
    assert json.loads(described.read_text())["kind"] == "parallel"


def run(folder: Path, program: str, *words: str) -> str:
    module = f"cli.{program.removeprefix('transformerlm-').replace('-', '_')}"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{program} {words}\n{done.stderr}"
    return " ".join(done.stdout.split())
