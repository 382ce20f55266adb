"""A run directory is made once, taken up only as the run it was, and says how it stands."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainkit import artifacts
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from trainkit.run_directory import (
    MAY_CHANGE,
    changed_settings,
    create_run_directory,
    hold_run_directory,
    read_status,
    set_aside,
    write_status,
    write_summary,
)

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "seed": 1, "dir": "runs"},
    "training": {"max_steps": 100, "log_every": 10, "device": "auto", "compile": False},
    "optimizer": {"learning_rate": 3e-4, "betas": (0.9, 0.95)},
    "data": {"prefetch": 2, "paths": ["x", "y"]},
    "logging": {"console": "auto"},
}


def with_setting(name: str, value: object) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    table, _, key = name.rpartition(".")
    config.setdefault(table, {})[key] = value
    return config


def test_a_new_run_writes_what_it_is(tmp_path: Path) -> None:
    path = create_run_directory(tmp_path / "runs" / "a", config_toml="# mine\n", config_json=CONFIG)
    assert (path / "config.toml").read_text() == "# mine\n"
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    status = read_status(path)
    assert (status["status"], status["step"]) == ("running", 0)
    environment = json.loads((path / "environment.json").read_text())
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["torch"].split("+")[0] == environment["torch"].split("+")[0]
    assert environment["cpu"] and environment["threads"] >= 1 and "pytest" in environment["command"]
    assert platform.node() not in json.dumps({k: environment[k] for k in ("platform", "cpu", "git", "variables")})
    assert {p.name for p in path.iterdir()} == {"config.toml", "config.json", "environment.json", "status.json"}


def test_the_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *settings, *arguments], capture_output=True, text=True, check=True).stdout

    def recorded(name: str) -> Any:
        path = create_run_directory(tmp_path / name, config_json=CONFIG)
        return json.loads((path / "environment.json").read_text())["git"]

    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert recorded("none") is None
    git("init", "-q")
    Path("file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert recorded("clean") == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    Path("file").write_text("2")
    assert recorded("dirty")["dirty"]


def test_an_existing_run_is_refused_without_resume(tmp_path: Path) -> None:
    path = create_run_directory(tmp_path / "a", config_json=CONFIG)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(UserError, match=r"holds a run already; continue it with --resume") as error:
        create_run_directory(path, config_json=CONFIG)
    assert error.value.exit_code == EXIT_USAGE and "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_run_without_its_configuration_is_neither_overwritten_nor_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="--resume"):
        create_run_directory(tmp_path, config_json=CONFIG)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        create_run_directory(tmp_path, config_json=CONFIG, resume=True)


@pytest.mark.parametrize("content", ["{", "[]", "3", ""])
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="missing or damaged"):
        create_run_directory(tmp_path, config_json=CONFIG, resume=True)


def test_a_directory_with_other_things_becomes_a_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    create_run_directory(tmp_path, config_json=CONFIG)
    assert (tmp_path / "tokenizer").is_dir() and (tmp_path / "config.json").is_file()


def test_resume_takes_up_the_run_and_its_step(tmp_path: Path) -> None:
    path = create_run_directory(tmp_path / "a", config_toml="1", config_json=CONFIG)
    write_status(path, "preempted", step=42, message="SIGTERM")
    assert read_status(path)["message"] == "SIGTERM"
    create_run_directory(path, config_json=CONFIG, resume=True)
    assert (read_status(path)["status"], read_status(path)["step"]) == ("running", 42)
    assert (path / "config.toml").read_text() == "1"


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    create_run_directory(tmp_path / "a", config_json=CONFIG, resume=True)
    assert read_status(tmp_path / "a")["step"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run.name", "b"),
        ("run.dir", "/elsewhere"),
        ("training.log_every", 1),
        ("training.device", "cpu"),
        ("data.prefetch", 0),
        ("logging.console", "off"),
        ("logging.new", True),
        ("checkpoint.keep_last", 9),
    ],
)
def test_what_is_seen_and_kept_may_change(tmp_path: Path, name: str, value: object) -> None:
    path = create_run_directory(tmp_path / "a", config_json=CONFIG)
    changed = with_setting(name, value)
    create_run_directory(path, config_json=changed, resume=True)
    assert json.loads((path / "config.json").read_text()) == changed


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("optimizer.learning_rate", 1e-3, "optimizer.learning_rate: 0.0003 -> 0.001"),
        ("optimizer.betas", [0.9, 0.99], "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]"),
        ("training.max_steps", 200, "training.max_steps: 100 -> 200"),
        ("training.compile", 0, "training.compile: false -> 0"),
        ("data.paths", ["x"], 'data.paths: ["x", "y"] -> ["x"]'),
        ("data.prefetcher", 1, "data.prefetcher: not set -> 1"),
        ("model.d_model", 8, "model.d_model: not set -> 8"),
        ("run.seed", 2, "run.seed: 1 -> 2"),
    ],
)
def test_what_the_run_computes_may_not_change(tmp_path: Path, name: str, value: object, line: str) -> None:
    path = create_run_directory(tmp_path / "a", config_json=CONFIG)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    changed = with_setting(name, value)
    with pytest.raises(UserError) as error:
        create_run_directory(path, config_json=changed, resume=True)
    assert error.value.exit_code == EXIT_USAGE
    assert str(error.value).splitlines()[1:] == [f"  {line}"]
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    create_run_directory(path, config_json=changed, resume=True, allow=(name,))
    assert json.loads((path / "config.json").read_text()) == changed


def test_a_setting_that_is_gone_is_a_change() -> None:
    assert changed_settings({"a": {"b": 1, "c": 2}}, {"a": {"c": 2}}, ()) == {"a.b": "1 -> not set"}
    assert changed_settings({"a": {}}, {}, ()) == {"a": "{} -> not set"}
    assert changed_settings({"logging": {"a": 1}, "loggings": {"a": 1}}, {}, MAY_CHANGE) == {
        "loggings.a": "1 -> not set"
    }


@pytest.mark.parametrize("inner", ["file", "file/a", "file/a/b"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, inner: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the run directory .*; choose another run\.dir") as error:
        create_run_directory(tmp_path / inner, config_json=CONFIG)
    assert error.value.exit_code == EXIT_FAILURE and "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        create_run_directory(tmp_path / "a", config_json=CONFIG)


def test_a_kill_while_it_is_made_leaves_a_place_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`config.json` comes last: without it there is no run, and the same command works again."""
    made: list[str] = []
    publish = artifacts.publish_file

    for stop in range(4):

        def publish_and_die(path: Path, data: str, stop: int = stop) -> None:
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append(path.name)
            publish(path, data)

        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr("trainkit.run_directory.publish_file", publish_and_die)
            with pytest.raises(KeyboardInterrupt):
                create_run_directory(tmp_path / "a", config_toml="", config_json=CONFIG)
        assert "config.json" not in made
    create_run_directory(tmp_path / "a", config_toml="", config_json=CONFIG)


def test_status_and_summary_are_replaced_whole(tmp_path: Path) -> None:
    assert read_status(tmp_path) == {}
    for step in (1, 2):
        write_status(tmp_path, "finished", step=step)
        write_summary(tmp_path, {"loss": 1 / step})
    assert (read_status(tmp_path)["status"], read_status(tmp_path)["step"]) == ("finished", 2)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 0.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["status.json", "summary.json"]
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) == {}


HOLD = """
import os, signal, sys, time
from trainkit.errors import UserError
from trainkit.run_directory import hold_run_directory
try:
    with hold_run_directory(sys.argv[1]):
        if sys.argv[2] == "die":
            child = os.fork()
            if child == 0:
                time.sleep(60)
            print(child, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
except UserError as error:
    print(error)
"""


def hold_elsewhere(path: Path, how: str = "leave") -> str:
    done = subprocess.run([sys.executable, "-c", HOLD, path, how], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return done.stdout.decode()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with hold_run_directory(tmp_path / "run"):
        assert "another process is training" in hold_elsewhere(tmp_path / "run")
    assert hold_elsewhere(tmp_path / "run") == ""


def test_a_live_run_is_not_set_aside(tmp_path: Path) -> None:
    code = "import sys; from trainkit.run_directory import set_aside; set_aside(sys.argv[1])"
    with hold_run_directory(tmp_path / "run"):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True)
    assert "another process is training" in done.stderr and (tmp_path / "run").exists()
    set_aside(tmp_path / "run")
    assert (tmp_path / "run.before-1").exists() and not (tmp_path / "run").exists()
    set_aside(tmp_path / "run")


def test_a_worker_that_outlives_its_parent_does_not_hold_the_run(tmp_path: Path) -> None:
    """A forked data worker inherits the descriptors of a parent that is then killed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), "die"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.wait()
        try:
            with hold_run_directory(tmp_path):
                pass
        finally:
            os.kill(worker, 9)


def test_a_number_that_json_lacks_is_written_as_null(tmp_path: Path) -> None:
    write_summary(tmp_path, {"loss": float("nan"), "best": {"value": [1.5, float("-inf")]}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": None, "best": {"value": [1.5, None]}}


def test_a_run_with_an_infinite_setting_resumes(tmp_path: Path) -> None:
    config = with_setting("training.gradient_clip", float("inf"))
    for resume in (False, True):
        create_run_directory(tmp_path / "a", config_json=config, resume=resume)
