"""Every command of the documents runs: here, made short, or in the test that `ELSEWHERE` names."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config.schemas import COMMANDS
from tests.docs.conftest import TINY_CORPUS, TINY_MODEL, TINY_RUN
from tests.docs.documents import DOCUMENTS, ROOT, Shown, commands
from trainkit.logging.run_log import open_run_log
from trainkit.specs import LoggingSpec

ELSEWHERE: Mapping[str, str] = {
    r"(README.md#Remote GPU hosts|docs/remote.md#.*): (just|cp|printf|cd|sbatch|runpodctl|docker)\b.*":
        "tests/operations/test_recipes.py::test_every_command_of_the_documentation_runs",
    r"docs/inference.md#.*: transformerlm-.*":
        "tests/inference/test_documentation.py::test_what_is_a_command_runs",
    r"docs/cloud.md#.*: .*|.*: transformerlm-pipeline --mode cloud --profile runpod_2b .*":
        "tests/cli/test_pipeline_profiles.py::test_every_command_of_the_document_runs",
    r"docs/tokenizer.md#.*: transformerlm-train-tokenizer.*":
        "tests/tokenizer/test_docs.py::test_everything_in_the_document_runs_as_it_is_printed",
    r"docs/extending.md#.*: transformerlm-.*":
        "tests/docs/test_extending.py::test_the_steps_work",
    r".*: nsys .*":
        "tests/profiling/test_documentation.py::test_what_comes_after_nsys_runs",
    r"README.md#Sizes: python -m cli.profiles runpod_2b .*":
        "tests/config/test_profiles.py::test_the_table_of_one_profile_takes_settings",
    r".*: torchrun .* -m cli.train .*":
        "tests/cli/test_pipeline.py::test_two_ranks_under_torchrun_train_the_same_model",
    r".*: python examples/mlp.py":
        "tests/trainkit/test_examples.py::test_an_mlp_on_numbers_learns_and_knows_that_it_is_done",
    r".*: python -m cli.document":
        "tests/docs/test_command_pages.py::test_they_are_written_where_they_are_wanted",
    r"README.md#Install: (git clone|cd) .*":
        "tests/operations/test_scripts.py::test_bootstrap_clones_and_updates",
    r".*: uv sync":
        "tests/operations/test_scripts.py::test_dependencies_fall_back_to_the_lock_file",
    r".*: pre-commit install":
        "tests/docs/test_commands_in_docs.py::test_the_hooks_can_be_installed",
    r".*: pytest\b.*":
        "tests/docs/test_commands_in_docs.py::test_pytest_knows_its_words",
    r".*: just check":
        "tests/docs/test_commands_in_docs.py::test_just_knows_the_checks",
    r".*: python -m benchmarking.bench_loop":
        "tests/docs/test_commands_in_docs.py::test_the_benchmark_of_the_loop_runs",
}  # fmt: skip
"""Commands (`document#section: command`) that this module does not run, and the test that does."""

SHOWN = [shown for document in DOCUMENTS for shown in commands(document)]
MY_TOML = """
[tokenizer]
path = "data/tokenizer"
[data]
megatron_train_prefix = "data/train"
megatron_val_prefix = "data/val"
"""


def elsewhere(shown: Shown) -> str | None:
    name = f"{shown.document}#{shown.section}: {' '.join(shown.words)}"
    return next((test for pattern, test in ELSEWHERE.items() if re.fullmatch(pattern, name)), None)


HERE = [shown for shown in SHOWN if elsewhere(shown) is None]
RUN_HERE = sorted({shown.document for shown in HERE})


def is_ours(shown: Shown) -> bool:
    return shown.words[0] in COMMANDS or shown.words[:1] == ("python",)


# -- nothing is left out -----------------------------------------------------------------------------------------------


def test_commands_are_found() -> None:
    assert len(SHOWN) > 100 and {shown.words[0] for shown in HERE} >= COMMANDS.keys()


def test_every_command_runs_somewhere() -> None:
    unknown = [str(shown) for shown in HERE if not is_ours(shown)]
    assert not unknown, "run these here, or name the test that does in ELSEWHERE:\n" + "\n".join(unknown)


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_the_test_that_is_named_exists(pattern: str) -> None:
    path, _, function = ELSEWHERE[pattern].partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE), ELSEWHERE[pattern]
    assert any(elsewhere(shown) == ELSEWHERE[pattern] for shown in SHOWN), f"no document shows {pattern}"


# -- quickly: flags and settings are known -----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "config" / "resources", "config/resources")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("document", RUN_HERE)
def test_flags_and_settings_are_known(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    for shown in HERE:
        if shown.document == document and shown.words[0] in COMMANDS:
            write_my_files(shown)
            code = main_of(shown.words[0])([*shown.words[1:], "--print-config"])
            printed = capsys.readouterr()
            assert code == expected_code(shown), f"{shown}\n{printed.err}"
            check_output(shown, printed.out + printed.err)


def main_of(command: str):
    return importlib.import_module(f"cli.{command.removeprefix('transformerlm-').replace('-', '_')}").main


def write_my_files(shown: Shown) -> None:
    """What the reader calls `my.toml` is whatever fits the command; the pipeline makes its token files."""
    Path("my.toml").write_text("" if shown.words[0] == "transformerlm-pipeline" else MY_TOML)
    Path("my_tokenizer.toml").write_text("")
    made = Path("artifacts/m3-medium/train.toml")  # by the pipeline
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(MY_TOML)


def expected_code(shown: Shown) -> int:
    return 2 if shown.output.startswith(f"{shown.words[0]}: ") else 0


def check_output(shown: Shown, printed: str) -> None:
    """Every line that the document prints is there, whatever stands between; `…` is what it leaves out."""
    printed = printed.replace(f"{ROOT}/", "")
    for line in shown.output.splitlines():
        words = line.split()
        assert line == "…" or any(words == found.split() for found in printed.splitlines()), f"{shown}: {line}"


# -- slowly: they run --------------------------------------------------------------------------------------------------


def short(shown: Shown) -> Sequence[str]:
    """Settings, which win over those of the document, that make a command a matter of a second."""
    program, words = shown.words[0], shown.words[1:]
    grammar = () if {"corpus.kind=files", "--input"} & set(words) else TINY_CORPUS
    is_deep = any(word.startswith("model.depth=") for word in words)
    model = () if is_deep else TINY_MODEL
    windows = ("model.context_length=32", "training.total_batch_size=256") if is_deep else ()
    match program:
        case "transformerlm-train":
            return (*model, *TINY_RUN, *windows, *instead_of_the_hub(words))
        case "transformerlm-pipeline":
            return ("tokenizer.vocab_size=300", *grammar, *model, *TINY_RUN)
        case "transformerlm-train-tokenizer":
            return ("--force", "tokenizer.vocab_size=300", *grammar)
        case "transformerlm-make-data":
            return ("--workers=1", *grammar)
        case "transformerlm-infer":
            return ("inference.total_length=64", "--device=cpu")
        case "transformerlm-eval":
            stories = ("data.num_stories=2",) if "data.kind=grammar" in words else ()
            return ("evaluation.max_documents=2", "evaluation.draws=1", "--device=cpu", *stories)
        case "transformerlm-replay":
            return ("replay.step=2", "--device=cpu")
        case "transformerlm-bench-infer":
            few = ("batch_sizes=[1]", "repeats=1", "warmups=0", "samples=2", "length=16", "device=cpu")
            return ("model.num_layers=1", *(f"benchmark.{setting}" for setting in few))
        case "transformerlm-bench-tokenizer":
            few = ("megabytes=0.02", 'measure=["encode"]', "repeats=1", "vocab_size=300", "machine=false")
            return tuple(f"benchmark.{setting}" for setting in few)
        case _:
            more = ("--dataset", "train.jsonl", "--config", "", "--root", "datasets", "--val-fraction", "0.3")
            fewer = ("--stories", "2", "--draws", "1") if "cli.compare_objectives" in words else ()
            return more if "scripts/shard_dataset.py" in words else fewer


def instead_of_the_hub(words: Sequence[str]) -> Sequence[str]:
    """A folder with the same splits, and the shards where the workspace has them."""
    if "train_packed" in words and not any(word.startswith("data.dataset_name=") for word in words):
        return ("data.dataset_name=tinystories",)
    here = [word.replace("=/workspace/", "=") for word in words if "=/workspace/" in word]
    return (*here, *(f"{word.partition('=')[0]}={Path(word.partition('=')[2]).resolve()}" for word in here))


def run(shown: Shown) -> int:
    write_my_files(shown)
    program, *words = shown.words
    if program in COMMANDS:
        if trains(shown):
            remove_run(shown)
        if "--resume" in words:  # there has to be something
            assert main_of(program)([*(word for word in words if word != "--resume"), *short(shown)]) == 0
        return main_of(program)([*words, *short(shown)])
    if words[0] == "-m":
        return importlib.import_module(words[1]).main([*words[2:], *short(shown)])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, ROOT / words[0], *words[1:], *short(shown)], env=environment).returncode


def trains(shown: Shown) -> bool:
    looks = {"--print-config", "--explain", "--schema", "--help"}
    return shown.words[0] in ("transformerlm-train", "transformerlm-pipeline") and not looks & set(shown.words)


def remove_run(shown: Shown) -> None:
    """Commands that stand below each other may be alternatives: each begins its run anew."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main_of(shown.words[0])([*shown.words[1:], "--print-config", "json"])
    settings = json.loads(output.getvalue())
    shutil.rmtree(Path(settings["run"]["dir"]) / settings["run"]["name"], ignore_errors=True)
    if "artifacts" in settings:
        shutil.rmtree(Path(settings["artifacts"]["dir"]) / "tokenizer", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("document", RUN_HERE)
def test_what_is_shown_works(document: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for shown in HERE:
        if shown.document == document and not shown.output:
            monkeypatch.setattr(sys, "stdin", io.StringIO("One day, Tom\n"))
            code = run(shown)
            printed = capfd.readouterr()
            assert code == 0, f"{shown}\n{printed.err}"
            assert printed.out or printed.err, f"{shown} prints nothing"


# -- the tools of the house --------------------------------------------------------------------------------------------


def test_the_hooks_can_be_installed(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".pre-commit-config.yaml", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run([sys.executable, "-m", "pre_commit", "install"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / ".git" / "hooks" / "pre-commit").exists()


def test_pytest_knows_its_words(pytestconfig: pytest.Config) -> None:
    """Markers are registered, files exist; what pytest then does is what you are looking at."""
    markers = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    for shown in SHOWN:
        if shown.words[0] == "pytest":
            words = list(shown.words[1:])
            if "-m" in words:
                expression = words.pop(words.index("-m") + 1)
                assert set(re.findall(r"\w+", expression)) - {"not", "and", "or"} <= markers, shown
            assert all((ROOT / word).exists() for word in words if not word.startswith("-")), shown


@pytest.mark.skipif(shutil.which("just") is None, reason="just is not installed")
def test_just_knows_the_checks() -> None:
    command = ["just", "--dry-run", "--justfile", str(ROOT / "Justfile"), "check"]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert all(tool in steps for tool in ("ruff check", "pyright", "lint-imports", "shellcheck"))
    assert "just check" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_benchmark_of_the_loop_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarking import bench_loop

    small = bench_loop.Workload(lambda: torch.nn.Linear(8, 8), torch.ones(4, 8), 4)
    for name, value in {"REPEATS": 1, "NULL": small, "LARGE": small, "open_run_log": without_plots}.items():
        monkeypatch.setattr(bench_loop, name, value)
    threads = torch.get_num_threads()
    bench_loop.main()
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["trainkit"] > 0


def without_plots(folder: Path, logging: LoggingSpec, *, total_steps: int) -> object:
    return open_run_log(folder, replace(logging, plots=False), total_steps=total_steps)
