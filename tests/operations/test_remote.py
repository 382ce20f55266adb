"""The recipes on a real sshd, tmux and rsync: trained there, killed, attached to, stopped, fetched and resumed here."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.operations.conftest import KEY, TINY, Laptop
from tests.operations.hosts import Host, end_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PATIENCE = 420.0
"""Seconds; only what hangs takes that long, on a machine that has ten other things to do as well."""
TYPE_AGAIN = 5.0
"""Seconds after which somebody who wants to leave tries again."""


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.3)


def wait_for_training(host: Host, true: Callable[[], bool], what: str) -> None:
    """Wait for what the session of the host does; that it ended before is known at once, and why is shown."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = on_tmux(host, "list-panes", "-a", "-F", "#{pane_dead}").strip() == "1"
        if true():
            return
        assert not ended and time.monotonic() < deadline, f"waited in vain for {what}\n{screen(host)}"
        time.sleep(0.3)


def wait_for_state(host: Host, run: str, state: str) -> None:
    wait_for_training(host, lambda: status(host, run).get("status") == state, f"{run} to be {state}")


def status(host: Host, run: str) -> dict[str, object]:
    try:
        return json.loads((host.root / "runs" / run / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def records(run: Path) -> list[dict[str, object]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def on_tmux(host: Host, *words: str) -> str:
    variables = {**os.environ, "TMUX_TMPDIR": str(host.home.with_suffix(".tmux"))}
    return subprocess.run(["tmux", *words], env=variables, capture_output=True, text=True, check=True).stdout


def screen(host: Host) -> str:
    return on_tmux(host, "capture-pane", "-p", "-S", "-200").rstrip()


def checkpoints(host: Host, run: str) -> list[str]:
    return sorted(path.name for path in (host.root / "runs" / run / "checkpoints").glob("step-*"))


def newest_step(host: Host, run: str) -> int:
    return int(checkpoints(host, run)[-1].removeprefix("step-"))


@contextmanager
def watching_processes() -> Generator[set[str]]:
    """All command lines that were seen while the block ran."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@contextmanager
def attached(laptop: Laptop) -> Generator[tuple[int, subprocess.Popen[bytes]]]:
    """`just attach-train` on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["just", "attach-train"],
        cwd=laptop.root,
        env={**laptop.variables, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield ours, process
    finally:
        end_tree(process.pid)
        process.wait()
        os.close(ours)


def read_until(terminal: int, words: bytes) -> bytes:
    shown = b""
    deadline = time.monotonic() + PATIENCE
    while words not in shown:
        assert time.monotonic() < deadline, shown[-2000:]
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 1 << 16)
    return shown


def exit_code(terminal: int, process: subprocess.Popen[bytes], keys: bytes = b"") -> int:
    """Of a process that leaves, or does when it is typed `keys`.

    They are typed again and again: tmux takes keys for pasted text if it sees them at the same time as what came
    before, as it may on a busy machine. The terminal is read, since the process could not leave with unwritten words.
    """
    started = typed = time.monotonic()
    os.write(terminal, keys)
    while process.poll() is None:
        assert time.monotonic() < started + PATIENCE, "it does not leave"
        if time.monotonic() > typed + TYPE_AGAIN:
            typed = time.monotonic()
            os.write(terminal, keys)
        with suppress(OSError):
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 1 << 16)
    return process.wait()


@pytest.fixture(autouse=True)
def no_sessions(hosts: list[Host]) -> Generator[None]:
    """A test that fails leaves no training behind for the next one."""
    yield
    for host in hosts:
        with suppress(subprocess.CalledProcessError):
            on_tmux(host, "kill-server")


def test_everything_at_once_to_the_end(laptop: Laptop, hosts: list[Host]) -> None:
    host = hosts[0]
    with watching_processes() as seen:
        said = laptop.just("auto-train", "config=tiny.toml")
        wait_for_state(host, "tiny", "finished")
    assert "train_session.sh" in "".join(seen), "the watch has seen the training"
    assert not [line for line in seen if KEY in line]
    assert KEY not in said

    listed = laptop.just("list-runs").split("\n")
    assert listed[0].split()[:4] == ["run", "state", "step", "of"]
    assert listed[1].split()[:4] == ["tiny", "finished", "30", "30"]

    # Again: what is there stays, and a run that has finished is not trained a second time.
    before = records(host.root / "runs" / "tiny")
    laptop.just("auto-train", "config=tiny.toml")
    laptop.just("kill-train")
    assert "no training session" in laptop.just("kill-train")
    assert status(host, "tiny")["status"] == "finished"
    assert [record for record in records(host.root / "runs" / "tiny") if "loss" in record] == [
        record for record in before if "loss" in record
    ]

    # The secret lies in one file, for its owner, and neither in logs nor in a history.
    secret = host.root / "env" / "wandb.env"
    assert secret.stat().st_mode & 0o777 == 0o600
    for place in (host.root, host.home, laptop.root):
        holding = [path for path in place.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
        assert {path.relative_to(place) for path in holding} <= {Path("env/wandb.env")}

    answer = laptop.just("infer", 'args=--checkpoint runs/tiny --prompt "Once  upon" inference.total_length=20')
    assert "Once  upon" in answer
    measured = laptop.just("infer", "command=uv run python -c", "args='import cli.train; print(cli.train.__file__)'")
    assert str(host.root) in measured, "the code of the checkout runs there, not what is installed"


def test_a_run_outlives_its_connection_and_goes_on_here(laptop: Laptop, hosts: list[Host], tmp_path: Path) -> None:
    host = hosts[0]
    laptop.just("bootstrap-remote")
    laptop.just("data-remote")
    laptop.just("sync-env")
    for _ in range(2):
        laptop.just("build-remote")
    laptop.just("train", "config=long.toml")
    with attached(laptop) as (terminal, process):
        read_until(terminal, b"tokens/s")
        wait_until(lambda: bool(host.connections()), "the connection")
        for connection in host.connections():
            end_tree(connection)  # as when the network goes away, only faster
        assert exit_code(terminal, process) != 0
    held = len(records(host.root / "runs" / "long"))
    run = host.root / "runs" / "long"
    wait_for_training(host, lambda: len(records(run)) > held + 5, "the run to go on without connection")

    # The server of tmux lives on when credentials have changed, and must not hand old ones to the next training.
    environment = on_tmux(host, "show-environment", "-g")
    assert "PATH=" in environment and KEY not in environment

    assert "runs already" in laptop.just("train", "config=long.toml")
    assert "another training runs" in laptop.just("train", "config=tiny.toml", check=False)
    with attached(laptop) as (terminal, process):
        read_until(terminal, b"tokens/s")
        assert exit_code(terminal, process, b"\x02d") == 0

    laptop.just("fetch", "any_file=runs/long", cwd=laptop.root)  # while it trains
    said = laptop.just("kill-train")
    assert "asked the run to save" in said and "the session has ended" in said
    stopped = status(host, "long")
    assert stopped["status"] == "preempted" and checkpoints(host, "long")[-1].endswith(str(stopped["step"]))
    assert f"long  preempted  {stopped['step']}" in laptop.just("list-runs")

    folder = laptop.root / "runs"
    folder.mkdir(exist_ok=True)
    for _ in range(2):
        laptop.just("fetch", "any_file=runs/long", cwd=folder)
    laptop.just("fetch", "any_file=runs/long/status.json", cwd=tmp_path)
    assert json.loads((tmp_path / "status.json").read_text()) == stopped
    laptop.just("fetch", "any_file=data", cwd=laptop.root)
    step = int(str(stopped["step"]))
    resumed = subprocess.run(
        [
            *(sys.executable, "-m", "cli.train", "--config", "long.toml"),
            *("--resume", "--new-horizon", f"training.max_steps={step + 3}"),
        ],
        cwd=laptop.root,
        env={**laptop.variables, "PYTHONPATH": str(laptop.root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((folder / "long" / "status.json").read_text())["step"] == step + 3
    scored = subprocess.run(
        [laptop.root / "scripts" / "eval_checkpoint.sh", "runs/long/checkpoints/latest", "Once upon"],
        cwd=laptop.root,
        env=laptop.variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert scored.returncode == 0 and "perplexity" in scored.stdout and "Once upon" in scored.stdout, scored.stderr


def test_a_training_that_dies_early_is_told_at_once(laptop: Laptop, hosts: list[Host], tmp_path: Path) -> None:
    root = str(tmp_path / "without data")
    laptop.just("bootstrap-remote", REMOTE_ROOT=root)
    said = laptop.just("train", "config=tiny.toml", check=False, REMOTE_ROOT=root, WANDB_MODE="offline")
    assert "train_text_document.bin does not exist" in said and "ended with exit code 1" in said
    assert "log.txt" not in said, "there is no run that could have one"
    assert "Recipe" not in said and "recipe `" not in said
    again = laptop.just("attach-train", REMOTE_ROOT=root)
    assert "ended with exit code 1" in again and "the training has ended" in again


def test_a_text_of_ones_own_travels_with_the_code(laptop: Laptop, hosts: list[Host]) -> None:
    (laptop.root / "mytext").mkdir()
    text = "".join(f"Once upon a time there was dog number {number}.\n" for number in range(2000))
    (laptop.root / "mytext" / "t.txt").write_text(text)
    laptop.just("bootstrap-remote")
    settings = "training.max_steps=2 training.precision=fp32 training.threads=1 logging.plots=false"
    laptop.just("train", f"extra=--text mytext/t.txt --vocab-size 300 {settings}", WANDB_MODE="offline")
    wait_for_state(hosts[0], "t", "finished")
    wait_for_training(hosts[0], lambda: "the log is in runs/t/log.txt" in screen(hosts[0]), "the session's end")
    assert "the log is in runs/t/log.txt" in laptop.just("attach-train")
    assert "there is no runs/nope on the host" in laptop.just("fetch", "any_file=runs/nope", check=False)


def test_a_killed_run_is_told_from_a_running_one_and_taken_up_again(laptop: Laptop, hosts: list[Host]) -> None:
    host = hosts[0]
    (laptop.root / "mortal.toml").write_text(TINY.format(base="config/resources/simplestories.toml", steps=100_000))
    laptop.just("bootstrap-remote")
    laptop.just("data-remote")
    laptop.just("train", "config=mortal.toml", "run.name=mortal", WANDB_MODE="offline")
    wait_for_training(host, lambda: len(checkpoints(host, "mortal")) > 0, "a checkpoint")
    assert "mortal  running" in laptop.just("list-runs")
    end_tree(int(on_tmux(host, "list-panes", "-a", "-F", "#{pane_pid}")))  # with SIGKILL, what trains among them
    wait_until(lambda: "mortal  killed" in laptop.just("list-runs"), "the run to be listed as killed")
    reached = newest_step(host, "mortal")
    laptop.just("train", "config=mortal.toml", "run.name=mortal", WANDB_MODE="offline")
    wait_for_training(host, lambda: newest_step(host, "mortal") > reached, "the run to go on")
    laptop.just("kill-train")
    assert status(host, "mortal")["status"] == "preempted"


def test_a_sweep_runs_line_by_line(laptop: Laptop, hosts: list[Host]) -> None:
    host = hosts[0]
    laptop.just("bootstrap-remote")
    laptop.just("data-remote")
    (laptop.root / "sweep.txt").write_text(
        "# two that work, and one between them that cannot\n"
        "optimizer.learning_rate=3e-4 'inference.prompts=[\"it''s a\"]'\n"
        "tokenizer.path=data/nothing --name 'broken'\n"
        "run.name=named optimizer.learning_rate=1e-3"
    )
    laptop.just("sweep", "overrides=sweep.txt", "config=tiny.toml", "extra=training.max_steps=6", WANDB_MODE="offline")
    wait_for_state(host, "named", "finished")
    first = next((host.root / "runs").glob("learning_rate-3e-4*"))
    assert status(host, first.name)["status"] == "finished" and status(host, first.name)["step"] == 6
    assert json.loads((first / "config.json").read_text())["inference"]["prompts"] == ["its a"]
    assert not (host.root / "runs" / "broken").exists()
    wait_for_training(host, lambda: "3 runs, 1 failed" in screen(host), "the sweep's end")
    assert "3 runs, 1 failed" in laptop.just("kill-train")

    # Asked to stop, it stops: the run that trains saves, and the next one does not start.
    (laptop.root / "sweep.txt").write_text("run.name=first\nrun.name=second\n")
    laptop.just("sweep", "overrides=sweep.txt", "config=long.toml", WANDB_MODE="offline")
    wait_for_training(host, lambda: bool(checkpoints(host, "first")), "a checkpoint of the first run")
    assert "stopped" in laptop.just("kill-train")
    assert status(host, "first")["status"] == "preempted" and not (host.root / "runs" / "second").exists()


def test_two_hosts_train_one_model(laptop: Laptop, hosts: list[Host]) -> None:
    (laptop.root / "hosts.txt").write_text(f"# name, address\n{hosts[0].name} 127.0.0.1\n{hosts[1].name}")
    laptop.just("each", "hosts=hosts.txt", "bootstrap-remote")
    laptop.just("data-remote")
    laptop.just("sync-env")
    said = laptop.just(
        *("launch", "hosts=hosts.txt", "config=tiny.toml", "run.name=together", "--device", "cpu"),
        WANDB_MODE="offline",
        RENDEZVOUS_PORT=str(free_port()),
    )
    assert "node 1 of 2" in said
    wait_for_state(hosts[0], "together", "finished")
    environment = json.loads((hosts[0].root / "runs" / "together" / "environment.json").read_text())
    assert environment["variables"]["WORLD_SIZE"] == "2"
    laptop.just("each", "hosts=hosts.txt", "kill-train")

    longer = hosts[0].root / "runs" / "longer"
    for _ in range(2):  # the second goes on where the first was stopped
        before = len(checkpoints(hosts[0], "longer"))
        laptop.just(
            *("launch", "hosts=hosts.txt", "config=long.toml", "run.name=longer", "--device", "cpu"),
            WANDB_MODE="offline",
            RENDEZVOUS_PORT=str(free_port()),
        )
        wait_for_training(hosts[0], lambda: len(records(longer)) > 20, "the ranks to train")
        laptop.just("each", "hosts=hosts.txt", "kill-train")
        assert status(hosts[0], "longer")["status"] == "preempted" and len(checkpoints(hosts[0], "longer")) >= before


def test_without_rsync_it_travels_by_tar(laptop: Laptop, hosts: list[Host], tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in laptop.variables["PATH"].split(os.pathsep):
        for program in Path(folder).iterdir():
            if program.name != "rsync" and not (tools / program.name).exists():
                with suppress(FileExistsError):
                    (tools / program.name).symlink_to(program)
    root = tmp_path / "other root"
    laptop.just("bootstrap-remote", PATH=str(tools), REMOTE_ROOT=str(root))
    assert (root / "scripts" / "train_session.sh").stat().st_mode & 0o111
    assert not list(root.rglob("wandb.env"))
    (laptop.root / "gone.toml").write_text("")
    laptop.just("bootstrap-remote", PATH=str(tools), REMOTE_ROOT=str(root))
    assert (root / "gone.toml").exists()
    (laptop.root / "gone.toml").unlink()
    laptop.just("bootstrap-remote", REMOTE_ROOT=str(root))
    assert not (root / "gone.toml").exists() and (root / "data").is_dir()
    laptop.just("fetch", "any_file=config/resources/", cwd=tmp_path, PATH=str(tools), REMOTE_ROOT=str(root))
    assert (tmp_path / "resources" / "train.toml").is_file()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
