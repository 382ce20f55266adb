"""What the scripts are made of, and the scripts that need no other host."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.common import load_environment
from trainkit.run_directory import Status, write_status

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("infra/*.sh"), *ROOT.glob("infra/*.sbatch")])
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
AWKWARD = st.one_of(TEXT, st.text("'\"\\ $`!*?&|;<>(){}[]#~=\n", max_size=12))


def shell(
    script: str, *words: str, check: bool = True, variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Run lines of bash after `scripts/lib.sh` was read, with the strictness of the scripts."""
    ran = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source '{ROOT}/scripts/lib.sh'; {script}", "test", *words],
        env={**os.environ, **variables},
        capture_output=True,
        check=False,
        timeout=300,
    )
    # Decoded here, where `\r` stays what it is.
    done = subprocess.CompletedProcess(ran.args, ran.returncode, ran.stdout.decode(), ran.stderr.decode())
    assert not check or done.returncode == 0, done.stderr
    return done


def program(folder: Path, name: str, script: str) -> None:
    """A stand-in for a program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def only(folder: Path, *names: str) -> str:
    """A search path on which there is nothing but these programs and what lies in `folder`."""
    folder.mkdir(exist_ok=True)
    for name in names:
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    return str(folder)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_executable(path: Path) -> None:
    if path.name != "lib.sh":
        assert "\nset -euo pipefail\n" in path.read_text()
    assert path.stat().st_mode & stat.S_IXUSR
    # What macOS's bash 3.2 does not know.
    assert not re.search(
        r"\b(mapfile|readarray|declare -A|local -A|local -n)\b|\$\{\w+(@Q|,,|\^\^)\}", path.read_text()
    )


@settings(max_examples=30)
@given(st.lists(AWKWARD, max_size=4))
def test_quoted_words_arrive_as_they_were(words: list[str]) -> None:
    """Through two shells, one of them not bash, as on the way to a host."""
    script = r"""line=$(quoted "$@"); sh -c "set -- $line"'; for word; do printf "%s\0" "$word"; done'"""
    assert shell(script, *words).stdout.split("\0")[:-1] == words


def test_words_are_split_as_on_a_command_line() -> None:
    script = r"""split_words "$1"; printf '%s\0' ${WORDS[@]+"${WORDS[@]}"}"""
    text = """a=1  "b c" 'd["x"]' e\\ f $(date) `id` *.toml $HOME"""
    expected = ["a=1", "b c", 'd["x"]', "e f", "$(date)", "`id`", "*.toml", "$HOME"]
    assert shell(script, text).stdout.split("\0")[:-1] == expected
    assert shell('split_words "$1"; echo ${#WORDS[@]}', "  ").stdout == "0\n"
    done = shell(script, "it's", check=False)
    assert done.returncode == 2 and "quotes" in done.stderr


def test_env_files_mean_the_same_to_scripts_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(
        "# comment\n\nOPS_A=plain  # comment\nexport OPS_B=\"two words # kept\"\nOPS_C='$HOME `id`'\n"
        "  OPS_D = spaced \nOPS_E=\nOPS_F=a=b#c\r\nOPS_G=new\nOPS_H=$(id)\nOPS_I=# nothing\nOPS_J=last"
    )
    names = [f"OPS_{letter}" for letter in "ABCDEFGHIJ"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPS_G", "set before")
    script = """load_env "$1"; for name in "${@:2}"; do printf '%s\\0' "${!name}"; done"""
    of_scripts = shell(script, str(tmp_path / ".env"), *names).stdout.split("\0")[:-1]
    try:
        load_environment(tmp_path / ".env")
        of_commands = [os.environ[name] for name in names]
    finally:
        for name in names:
            os.environ.pop(name, None)
    assert of_scripts == of_commands
    assert dict(zip(names, of_scripts, strict=True))["OPS_G"] == "set before"


def test_a_damaged_env_file_is_refused_without_its_content(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("A=1\nsecret stuff\n")
    done = shell('load_env "$1"', str(tmp_path / ".env"), check=False)
    assert done.returncode == 2 and "line 2" in done.stderr and "secret" not in done.stderr


# -- bootstrap ---------------------------------------------------------------------------------------------------------

BASICS = ("bash", "sh", "mkdir", "chmod", "id", "hostname", "cat", "env", "ln", "touch", "dirname")


def bootstrap(tmp_path: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "scripts" / "bootstrap_remote.sh", *arguments],
        env={"PATH": path, "HOME": str(tmp_path / "home"), "LOG": str(tmp_path / "log")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def installer(tools: Path, name: str) -> None:
    """A package manager that writes down what it is asked for, and makes it."""
    words = "[[ $word == tmux || $word == rsync || $word == git || $word == curl ]]"
    program(
        tools,
        name,
        f'echo "{name} $*" >>"$LOG"; for word; do if {words}; then printf "#!/bin/bash\\n" >"{tools}/$word"; '
        f'chmod +x "{tools}/$word"; fi; done',
    )


@pytest.mark.parametrize("manager", ["apt-get", "dnf", "yum", "apk", "pacman", "zypper"])
def test_bootstrap_installs_what_is_missing(tmp_path: Path, manager: str) -> None:
    tools = tmp_path / "tools"
    path = only(tools, *BASICS)
    installer(tools, manager)
    program(tools, "sudo", 'shift; exec "$@"')
    makes_uv = f'printf "#!/bin/bash\\necho uv \\$* >>{tmp_path}/log" >"{tools}/uv"; chmod +x "{tools}/uv"'
    program(tools, "python3", f'echo "pip $*" >>"$LOG"; {makes_uv}')
    done = bootstrap(tmp_path, path, str(tmp_path / "the root"))
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text()
    assert f"{manager} " in log and "tmux rsync git curl" in log
    assert "pip -m pip install --quiet --user uv" in log and "uv tool install --quiet rust-just" in log
    assert {"data", "runs", "env"} <= {found.name for found in (tmp_path / "the root").iterdir()}
    assert (tmp_path / "the root" / "env").stat().st_mode & 0o777 == 0o700
    # Everything is there now, but for just.
    (tmp_path / "log").unlink()
    program(tools, "just", "")
    assert bootstrap(tmp_path, path, str(tmp_path / "the root")).returncode == 0
    assert not (tmp_path / "log").exists()


def test_bootstrap_tells_what_it_cannot_install(tmp_path: Path) -> None:
    done = bootstrap(tmp_path, only(tmp_path / "tools", *BASICS), str(tmp_path / "root"))
    assert done.returncode == 1 and "tmux is missing" in done.stderr
    path = only(tmp_path / "more", *BASICS)
    for name in ("tmux", "git", "rsync"):
        program(tmp_path / "more", name, "")
    program(tmp_path / "more", "curl", "echo offline >&2; exit 6")
    done = bootstrap(tmp_path, path, str(tmp_path / "root"))
    assert done.returncode == 1 and "uv could not be installed" in done.stderr


def test_bootstrap_clones_and_updates(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    source.mkdir()
    subprocess.run([*git, "init", "--quiet", "-b", "main"], check=True)
    (root / "data").mkdir(parents=True)
    tools = tmp_path / "tools"
    path = only(tools, *BASICS, "git")
    for name in ("tmux", "rsync", "curl", "uv", "just"):
        program(tools, name, "")
    for number in ("1", "2", "2"):
        (source / "file").write_text(number)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", number], check=True)
        done = bootstrap(tmp_path, path, str(root), str(source), "main")
        assert done.returncode == 0, done.stderr
        assert (root / "file").read_text() == number


# -- build, train, evaluate --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_dependencies_fall_back_to_the_lock_file(tmp_path: Path) -> None:
    """With real uv: a lock file that does not fit any more is used as it is where there is no network to renew it."""
    project = tmp_path / "project"
    project.mkdir()
    text = '[project]\nname = "p"\nversion = "0"\nrequires-python = ">=3.11"\ndependencies = [{}]\n'
    (project / "pyproject.toml").write_text(text.format(""))
    variables = {"UV_OFFLINE": "1", "UV_PYTHON": sys.executable, "UV_PROJECT_ENVIRONMENT": ".venv"}
    script = 'unset UV_NO_SYNC; cd "$1"; sync_dependencies'
    shell(script, str(project), variables=variables)
    assert (project / "uv.lock").exists() and (project / ".venv").is_dir()
    (project / "pyproject.toml").write_text(text.format('"no-such-package-of-anybody==1"'))
    done = shell(script, str(project), variables=variables)
    assert "lock file as it is" in done.stderr


def uv_that_tells(tmp_path: Path) -> dict[str, str]:
    program(tmp_path / "bin", "uv", 'printf "%s\\n" "$@" "project=${WANDB_PROJECT:-}" >>"$LOG"')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "LOG": str(tmp_path / "log"), "HOME": str(tmp_path)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ["--config-name", "baseline_transformer"]),
        (
            ("model.depth=6", "training.max_steps=5000"),
            ["--config-name", "baseline_transformer", "model.depth=6", "training.max_steps=5000"],
        ),
        (("--config-name=diffusion_transformer",), ["--config-name=diffusion_transformer"]),
        (("--config", "my own.toml"), ["--config", "my own.toml"]),
    ],
)
def test_train_baseline_transformer(tmp_path: Path, arguments: tuple[str, ...], expected: list[str]) -> None:
    variables = {**os.environ, **uv_that_tells(tmp_path)}
    variables.pop("WANDB_PROJECT", None)
    script = ROOT / "scripts" / "train_baseline_transformer.sh"
    subprocess.run([script, *arguments], cwd=tmp_path, env=variables, check=True, timeout=300)
    said = (tmp_path / "log").read_text().splitlines()
    assert said == ["run", "transformerlm-train", *expected, "project=transformerlm"]


def test_eval_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a b").mkdir(parents=True)
    script = ROOT / "scripts" / "eval_checkpoint.sh"
    variables = {**os.environ, **uv_that_tells(tmp_path)}
    subprocess.run([script, "runs/a b", "One day"], cwd=tmp_path, env=variables, check=True, timeout=300)
    said = (tmp_path / "log").read_text().splitlines()
    assert said[:4] == ["run", "transformerlm-eval", "--checkpoint", str(tmp_path / "runs" / "a b")]
    assert said[5:11] == [
        "run",
        "transformerlm-infer",
        "--checkpoint",
        str(tmp_path / "runs/a b"),
        "--prompt",
        "One day",
    ]
    done = subprocess.run([script, "nothing"], env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and "no checkpoint nothing" in done.stderr


# -- credentials -------------------------------------------------------------------------------------------------------


def start_training(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`run_train_remote.sh` where the configuration is always fine and tmux only writes down its arguments."""
    checkout = tmp_path / "checkout"
    if not checkout.exists():
        shutil.copytree(ROOT / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        (checkout / "env").mkdir()
    tools = tmp_path / "bin"
    program(tools, "uv", "")
    (tmp_path / "log").unlink(missing_ok=True)
    listing = "if [[ $1 == list-panes ]]; then [[ -s $LOG ]] && echo 0; exit; fi"
    program(tools, "tmux", f'{listing}; printf "%s\\n" "$@" >>"$LOG"; env >>"$LOG.env"')
    base = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return subprocess.run(
        [checkout / "scripts" / "run_train_remote.sh", "--", "--config", "my file.toml"],
        env={
            **base,
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "LOG": str(tmp_path / "log"),
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_training_wants_credentials_or_an_answer(tmp_path: Path) -> None:
    done = start_training(tmp_path)
    assert done.returncode == 2 and "just sync-env" in done.stderr and "WANDB_MODE=offline" in done.stderr
    assert not (tmp_path / "log").exists()
    assert start_training(tmp_path, WANDB_MODE="offline").returncode == 0
    assert "WANDB_MODE=offline" in (tmp_path / "log").read_text().splitlines()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    assert start_training(tmp_path).returncode == 0
    (tmp_path / ".netrc").unlink()
    (tmp_path / "checkout" / "env" / "wandb.env").write_text("WANDB_API_KEY=<your key>\n")
    done = start_training(tmp_path)
    assert done.returncode == 2 and "does not look like a key" in done.stderr and "your key" not in done.stderr


def test_tmux_never_sees_a_credential(tmp_path: Path) -> None:
    start_training(tmp_path)
    secret = "0123456789abcdef" * 3
    (tmp_path / "checkout" / "env" / "wandb.env").write_text(f"WANDB_API_KEY={secret}\n")
    done = start_training(tmp_path)
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "log").read_text() + (tmp_path / "log.env").read_text()
    assert "my file.toml" in seen and secret not in seen + done.stdout + done.stderr


# -- the end of a training ---------------------------------------------------------------------------------------------


def test_the_run_of_a_session_is_the_one_whose_status_is_newest(tmp_path: Path) -> None:
    script = 'cd "$1"; run_since "$2"; echo "$RUN_NAME|$RUN_STATE|$RUN_STEP"'
    assert shell(script, str(tmp_path), "0").stdout == "||\n"
    for name, state, step, moment in (("old", "finished", 9, 100.5), ("a b", "preempted", 12, 300.25)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        status = {"status": state, "step": step, "message": 'asked\n "step": 3', "time": moment}
        (tmp_path / "runs" / name / "status.json").write_text(json.dumps(status, indent=1))
    (tmp_path / "runs" / "c").mkdir()
    (tmp_path / "runs" / "c" / "status.json").write_text("half a fi")
    assert shell(script, str(tmp_path), "100").stdout == "a b|preempted|12\n"
    assert shell(script, str(tmp_path), "301").stdout == "||\n"


@pytest.mark.parametrize(
    ("state", "expected"),
    [("preempted", "mine has saved (step 12) and is still finishing"), ("running", "the run has not left")],
)
def test_a_run_that_has_saved_is_told_from_one_that_has_not(tmp_path: Path, state: Status, expected: str) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    write_status(run, state, step=12)
    panes = "[[ $* == *pane_pid* ]] && echo 99999999 || echo 0"  # a number that no process has
    program(tmp_path / "bin", "tmux", f"case $1 in list-panes) {panes} ;; display-message) echo 1000 ;; esac")
    done = subprocess.run(
        [tmp_path / "scripts" / "stop_train_remote.sh", "1"],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1 and expected in done.stderr, done.stderr


# -- runs --------------------------------------------------------------------------------------------------------------


def listed(folder: Path) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "list_runs.py", folder], capture_output=True, text=True, check=True
    )
    return [line.split()[:4] for line in done.stdout.splitlines()]


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "wb")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


def test_runs_are_listed_with_state_and_step(tmp_path: Path) -> None:
    assert listed(tmp_path) == [] and listed(tmp_path / "nothing") == []
    for name, status, step in (("b", "finished", 10), ("a", "running", 0), ("c", "preempted", 4)):
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"training": {"max_steps": 10}}))
        (run / "status.json").write_text(json.dumps({"status": status, "step": step, "time": time.time()}))
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 3}\n{"step": 7, "loss": 1}\n{"note": 1}\n{"step": 8')
    (tmp_path / "a" / ".lock").touch()
    (tmp_path / "no run").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "a" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        assert listed(tmp_path)[1:] == [
            ["a", "running", "7", "10"],
            ["b", "finished", "10", "10"],
            ["c", "preempted", "4", "10"],
        ]
        holder.stdin.close()
    assert listed(tmp_path)[1] == ["a", "killed", "7", "10"]
