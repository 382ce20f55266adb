from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli

from cli.common import Command, load_environment, run_command
from config.loading import Loaded, shipped_names
from config.schemas import PipelineConfig
from trainkit.errors import UserError

ran: list[tuple[Loaded[PipelineConfig], argparse.Namespace]] = []


def _record(loaded: Loaded[PipelineConfig], arguments: argparse.Namespace) -> None:
    ran.append((loaded, arguments))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", nargs="?", const="latest", metavar="WHICH", help="continue a run")
    parser.add_argument("--force", action="store_true", help="do it again")
    parser.add_argument("--text-file", metavar="FILE", help="some text")


def command(run: Any = _record) -> Command[PipelineConfig]:
    return Command(
        name="transformerlm-test",
        summary="Tests the frame.",
        schema=PipelineConfig,
        default_config="quickstart",
        run=run,
        examples=("model.depth=6",),
        useful=("training.max_steps", "corpus.kind", "model.context_length"),
        flags={"--max-steps": "training.max_steps", "--device": "training.device"},
        add_arguments=_add_arguments,
    )


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRANSFORMERLM_LOG", raising=False)
    ran.clear()


def run(*argv: str) -> tuple[PipelineConfig, argparse.Namespace]:
    assert run_command(command(), argv) == 0
    ((loaded, arguments),) = ran
    ran.clear()
    return loaded.config, arguments


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert run_command(command(), argv) == code
    assert not ran
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert all(line.startswith("transformerlm-test: ") for line in err.splitlines())
    return err


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["training.max_steps=7", "run.seed=8"],
        ["--override", "training.max_steps=7", "run.seed=8"],
        ["--override", "training.max_steps=7", "--override", "run.seed=8"],
        ["--override=training.max_steps=7", "run.seed=8"],
        ["--max-steps", "7", "run.seed=8"],
        ["--max_steps=7", "run.seed=8"],
        ["run.seed=8", "--max_steps", "7"],
        ["run.seed=8", "--override", "training.max_steps=7"],
        ["training.max_steps=9", "--max-steps", "7", "run.seed=8"],
        ["--max-steps", "9", "training.max_steps=7", "--override", "run.seed=8"],
        ["--resume", "training.max_steps=7", "--force", "run.seed=8"],
        ["--text-file", "training.max_steps=9", "training.max_steps=7", "run.seed=8"],
    ],
)
def test_all_ways_to_set_a_value(argv: list[str]) -> None:
    config, _ = run(*argv)
    assert (config.training.max_steps, config.run.seed) == (7, 8)


def test_flags_that_are_no_settings_reach_the_command() -> None:
    _, arguments = run("--resume", "best", "--force", "--text_file", "a_b.c=d")
    assert (arguments.resume, arguments.force, arguments.text_file) == ("best", True, "a_b.c=d")
    _, arguments = run("--resume", "model.depth=2")
    assert arguments.resume == "latest"
    _, arguments = run()
    assert (arguments.resume, arguments.force, arguments.text_file) == (None, False, None)


def test_which_file() -> None:
    Path("mine.toml").write_text("[run]\nseed = 4\n")
    assert run("--config", "mine.toml")[0].run.seed == 4
    assert run("--config-name", "corpus_long")[0].run.name == "corpus_long"
    assert run("--config_name=tinystories")[0].run.name == "tinystories"
    assert run()[0].run.name == "quickstart"


@pytest.mark.parametrize(
    ("argv", "words", "code"),
    [
        (["--forse"], "did you mean `--force`?", 2),
        (["--training.max_steps=5"], "write `training.max_steps=5`", 2),
        (["max_steps"], "neither a flag nor a setting", 2),
        (["--override", "max_steps"], "write table.key=value", 2),
        (["--override"], "expected at least one argument", 2),
        (["--config"], "expected one argument", 2),
        (["--print-config", "yaml"], "invalid choice", 2),
        (["--config", "gone.toml"], "There is no configuration file gone.toml", 1),
        (["--config", "quickstart.toml"], "--config-name quickstart", 1),
        (["--config-name", "gone"], f"the names are {', '.join(shipped_names())}", 2),
        (["--config", "a.toml", "--config-name", "train"], "not both", 2),
        (["training.lr=5"], "training.lr: no such setting; did you mean `optimizer.learning_rate`?", 2),
        (["--explain", "nope"], "There is no table 'nope'", 2),
    ],
)
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], words: str, code: int) -> None:
    message = fails(capsys, *argv, code=code)
    assert words in message and message.count("\n") == 1


def test_one_line_for_each_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(fails(capsys, "training.max_steps=0", "run.seed=x", "model.nope=1").splitlines()) == 3


# -- what prints and does not run --------------------------------------------------------------------------------------


def test_print_config_reads_back_and_touches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(command(), ["--print-config", "training.max_steps=7"]) == 0
    printed = capsys.readouterr().out
    assert "max_steps = 7" in printed and "# command line" in printed
    assert not ran and not list(tmp_path.iterdir())
    Path("a.toml").write_text(printed)
    assert run_command(command(), ["--config", "a.toml", "--print-config"]) == 0
    assert tomli.loads(capsys.readouterr().out) == tomli.loads(printed)


def test_print_config_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command(), ["--print_config=json", "training.max_steps=7"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["training"]["max_steps"] == 7 and printed["run"]["name"] == "quickstart"


def test_help_schema_and_explanations(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command(), ["-h"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "transformerlm-test model.depth=6",
        "training.max_steps=",
        "--resume [WHICH]",
        "--force",
        "grammar, files, hub",
    ):
        assert words in shown
    assert run_command(command(), ["--schema"]) == 0
    assert "TransformerSpec" in json.loads(capsys.readouterr().out)["$defs"]
    assert run_command(command(), ["--explain", "schedule"]) == 0
    assert "schedule.decay_fraction" in capsys.readouterr().out
    assert run_command(command(), ["--explain"]) == 0
    assert "[corpus]" in capsys.readouterr().out
    assert not ran


# -- how it ends -------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Command[PipelineConfig]:
    def work(loaded: Loaded[PipelineConfig], arguments: argparse.Namespace) -> None:
        raise error

    return command(work)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command(lambda loaded, arguments: 75), []) == 75
    assert run_command(command(lambda loaded, arguments: None), []) == 0
    assert run_command(raising(UserError("The file x is missing.")), []) == 1
    assert run_command(raising(UserError("The loss is not finite.", 3)), []) == 3
    assert run_command(raising(KeyboardInterrupt()), []) == 130
    errors = capsys.readouterr().err
    assert errors.splitlines()[0] == "transformerlm-test: The file x is missing." and "Traceback" not in errors


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()), [])


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX shell")
def test_a_reader_that_goes_away_is_no_error_message() -> None:
    code = (
        "import sys\n"
        "from tests.cli.test_common import command\n"
        "from cli.common import run_command\n"
        "def work(loaded, arguments):\n"
        "    while True: print('line')\n"
        "sys.exit(run_command(command(work), []))"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


# -- environment -------------------------------------------------------------------------------------------------------


def test_the_environment_wins_over_dot_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {"PLAIN": "a b", "QUOTED": "x # y", "SINGLE": "$z", "COMMENTED": "v", "EXPORTED": "e", "EMPTY": ""}
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what is set below
        monkeypatch.delenv(name)
    monkeypatch.setenv("TAKEN", "mine")
    Path(".env").write_text(
        "# secrets\n\nPLAIN=a b\nQUOTED=\"x # y\"  # why\nSINGLE='$z'\nCOMMENTED = v # why\nexport EXPORTED=e\nEMPTY=\n"
        "TAKEN=theirs\n"
    )
    run()
    assert {name: os.environ[name] for name in names} == names
    assert os.environ["TAKEN"] == "mine"


def test_a_damaged_dot_env_does_not_show_its_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".env").write_text("\nmy secret key\n")
    assert "Line 2 of .env is not NAME=value" in fails(capsys, code=1)
    with pytest.raises(UserError) as caught:
        load_environment(Path(".env"))
    assert "secret" not in str(caught.value)


def test_the_log_level(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    levels: list[int | str] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: levels.append(settings["level"]))  # pyright: ignore
    monkeypatch.setenv("TRANSFORMERLM_LOG", "info")
    run()
    assert levels == [logging.INFO]
    monkeypatch.setenv("TRANSFORMERLM_LOG", "loud")
    assert "TRANSFORMERLM_LOG=loud" in fails(capsys)
