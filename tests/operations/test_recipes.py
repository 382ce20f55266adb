"""The recipes as they are typed, shown by a dry run; and every command of the documentation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.operations.hosts import tool_folders

ROOT = Path(__file__).parents[2]
PROMISED = (
    *("bootstrap-remote", "data-remote", "build-remote", "train", "infer", "nvitop", "attach-train", "kill-train"),
    *("fetch", "list-runs", "sync-env", "auto-train", "sweep", "launch", "each"),
)

pytestmark = pytest.mark.skipif(
    not all(shutil.which(name) for name in ("just", "git")), reason="just or git is not installed"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes and scripts alone, in a folder with a space, with stand-ins for what costs money or time."""
    root = tmp_path_factory.mktemp("recipes") / "a checkout"
    for folder in ("scripts", "env", "infra"):
        ignored = shutil.ignore_patterns("__pycache__", "*.env")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in ("Justfile", ".env.example"):
        shutil.copy(ROOT / name, root / name)
    (root / "runs").mkdir()
    (root / "programs").mkdir()
    for name in ("uv", "sbatch", "runpodctl", "docker"):
        (root / "programs" / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (root / "programs" / name).chmod(0o755)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


def run(root: Path, *words: str, check: bool = True, **variables: str) -> str:
    base = {key: value for key, value in os.environ.items() if key not in {"CMD_INFER", "WANDB_MODE", "PRIME_HOST"}}
    path = os.pathsep.join([str(root / "programs"), *tool_folders(), base["PATH"]])
    done = subprocess.run(
        words,
        cwd=root,
        env={**base, "PATH": path, "DRY_RUN": "1", "PRIME_HOST": "me@host", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode == 0) == check, done.stdout
    return done.stdout


def test_the_list_teaches(checkout: Path) -> None:
    listed = run(checkout, "just")
    assert "[remote]" in listed and "[develop]" in listed
    for name in PROMISED:
        assert re.search(rf"^ +{name}\b.* # \w", listed, re.MULTILINE), name


CONFIG, EXTRA = "my dir/it's.toml", "training.max_steps=5 'run.name=a \"b\"' --device cpu"
EXPECTED = ["--config", CONFIG, "training.max_steps=5", 'run.name=a "b"', "--device", "cpu"]


@pytest.mark.parametrize(
    "words",
    [
        ("train", f"config={CONFIG}", f"extra={EXTRA}"),
        (f"config={CONFIG}", f"extra={EXTRA}", "train"),
        (f"config={CONFIG}", "train", f"extra={EXTRA}"),
        ("train", f"config={CONFIG}", "training.max_steps=5", 'run.name=a "b"', "--device", "cpu"),
    ],
)
def test_values_stand_before_or_after_the_recipe(checkout: Path, words: tuple[str, ...]) -> None:
    shown = run(checkout, "just", *words)
    assert training_words(shown) == EXPECTED


def training_words(shown: str) -> list[str]:
    """What `scripts/run_train_remote.sh` would get, read back by two real shells as on the way to the host."""
    line = next(line for line in reversed(shown.splitlines()) if "run_train_remote.sh" in line)
    start = line.index("export PATH") if line.startswith("shift;") else 0
    tail = line[line.index("in_checkout", start) :]
    # Inside the one word that ssh gets, each quote is written '\''; the word ends with the line.
    inner = tail.strip().removesuffix("'").replace("'\\''", "'")
    script = r'eval "set -- $1"; for word; do printf "%s\0" "$word"; done'
    words = subprocess.run(["sh", "-c", script, "sh", inner], capture_output=True, text=True, check=True).stdout
    found = words.split("\0")[:-1]
    return found[found.index("--") + 1 :]


def test_a_name_is_that_of_a_shipped_configuration(checkout: Path) -> None:
    assert training_words(run(checkout, "just", "train", "config=train_packed")) == ["--config-name", "train_packed"]
    assert training_words(run(checkout, "just", "train")) == ["--config", "config/resources/simplestories.toml"]
    for words in (["--text", "my text/t.txt"], ["--text=t.txt"]):  # has a configuration of its own
        assert training_words(run(checkout, "just", "train", *words)) == words
    named = run(checkout, "just", "train", "config=train", "extra=--text t.txt")
    assert training_words(named) == ["--config-name", "train", "--text", "t.txt"]


def test_settings_of_the_environment_reach_the_host(checkout: Path) -> None:
    shown = run(checkout, "just", "train", WANDB_MODE="offline", WANDB_API_KEY="secret-key-of-somebody")
    assert "WANDB_MODE=offline" in shown and "secret-key" not in shown
    shown = run(checkout, "just", "list-runs", SSH_OPTIONS="-p 2222 -o 'User Known=x y'", REMOTE_ROOT="~/some where")
    assert "-p 2222 -o 'User Known=x y' -- me@host" in shown and "'\\''some where'\\''" in shown
    assert "CMD" in run(checkout, "just", "infer", CMD_INFER="CMD with words")
    assert "--json" in run(checkout, "just", "infer", "args=--json")


def test_mistakes_are_told_in_a_sentence(checkout: Path) -> None:
    for words, message in (
        (("train", "extra=it's"), "quotes do not match"),
        (("fetch",), "name a file or folder"),
        (("sweep",), "name the file with one line of settings"),
        (("launch", "hosts=nothing"), "one host on each line"),
        (("each",), "name a recipe"),
        (("sync-env",), "wandb.env.example"),
    ):
        assert message in run(checkout, "just", *words, check=False), words
    assert "PRIME_HOST is not set" in run(checkout, "just", "train", check=False, PRIME_HOST="")
    assert "not an option" in run(checkout, "just", "train", check=False, PRIME_HOST="-oProxyCommand=touch x")


def test_a_dry_run_claims_nothing(checkout: Path) -> None:
    credentials = checkout / "env" / "wandb.env"
    credentials.write_text("WANDB_API_KEY=\n")
    try:
        shown = run(checkout, "just", "auto-train") + run(checkout, "just", "fetch", "any_file=runs/a")
    finally:
        credentials.unlink()
    for words in ("would send the files", "would send wandb.env", "would fetch a"):
        assert words in shown, words
    assert not re.search(r"\bsent the files|is on the host|is here", shown)


def test_nothing_is_left_in_the_folder_for_temporary_files(checkout: Path, tmp_path: Path) -> None:
    run(checkout, "just", "auto-train", TMPDIR=str(tmp_path))  # sends the code twice
    assert not list(tmp_path.iterdir())


def on_a_host(root: Path, home: Path, *words: str, check: bool = True) -> str:
    """The recipe with a stand-in for ssh: the command runs here, in another home folder."""
    programs = home / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "ssh").write_text(f'#!/bin/bash\ncd "{home}" && HOME="{home}" exec bash -c "${{!#}}"\n')
    (programs / "ssh").chmod(0o755)
    path = os.pathsep.join([str(programs), *tool_folders(), os.environ["PATH"]])
    return run(root, "just", *words, check=check, DRY_RUN="", PATH=path, WANDB_MODE="offline")


@pytest.mark.parametrize("recipe", ["build-remote", "train", "attach-train", "kill-train", "list-runs", "data-remote"])
def test_a_host_without_checkout_is_told_in_one_sentence(checkout: Path, tmp_path: Path, recipe: str) -> None:
    said = on_a_host(checkout, tmp_path, recipe, check=False)
    lines = [line for line in said.splitlines() if "Pseudo-terminal" not in line]  # there is no terminal here
    assert lines == ["there is no checkout transformerlm on this host; run: just bootstrap-remote"]
    assert not (tmp_path / "transformerlm").exists()


def test_what_is_not_there_to_fetch_is_told_in_one_sentence(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "transformerlm").mkdir()
    said = on_a_host(checkout, tmp_path, "fetch", "any_file=runs/no pe/", check=False)
    assert said == "there is no runs/no pe on the host; see just list-runs\n"


def blocks(path: Path, start: str = "", end: str = "\0") -> list[str]:
    text = path.read_text().partition(start)[2].partition(end)[0] if start else path.read_text()
    return re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_command_of_the_documentation_runs(checkout: Path) -> None:
    """Each block is a script; what talks to a host shows what it would do."""
    found = [*blocks(ROOT / "README.md", "\n## Remote GPU hosts", "\n## "), *blocks(ROOT / "docs" / "remote.md")]
    assert sum(block.count("just ") for block in found) > 25
    for name in PROMISED:
        assert any(f"just {name}" in block for block in found), f"{name} is not documented"
    for block in found:
        run(checkout, "bash", "-euo", "pipefail", "-c", block)
