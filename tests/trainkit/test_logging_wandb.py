"""Weights & Biases gets the records, continues a resumed run, and cannot hold up a run whatever its server does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.trainkit.test_loop import make_run
from trainkit.beginnings import choose_beginning, load_beginning
from trainkit.checkpoints import CheckpointStore, list_checkpoints, load_snapshot
from trainkit.logging import run_log
from trainkit.logging.records import Record, read_records
from trainkit.logging.run_log import open_run_log
from trainkit.logging.wandb import WandbSink, run_id
from trainkit.logging.wandb_process import _send  # pyright: ignore[reportPrivateUsage]
from trainkit.loop import train
from trainkit.specs import CheckpointSpec, LoggingSpec

pytest.importorskip("wandb")


def test_the_id_stays(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first and len(first) == 8


@pytest.mark.parametrize(("name", "is_same"), [("story", True), ("another", False)])
def test_a_run_goes_on_as_the_same_one_where_it_has_its_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_same: bool
) -> None:
    """On another machine, that is; under another name it is another run."""
    sent_to: list[str] = []

    class FakeSink:
        def __init__(self, directory: Path, spec: LoggingSpec) -> None:
            sent_to.append(run_id(directory / "wandb"))

        def write(self, record: Record) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(run_log, "WandbSink", FakeSink)
    spec = LoggingSpec(console="off", csv=False, plots=False, wandb="online")
    here, there = tmp_path / "here" / "story", tmp_path / "there" / name
    for directory, resume_from in ((here, ""), (there, str(tmp_path / "moved"))):
        place = CheckpointStore(directory / "checkpoints", CheckpointSpec(resume_from=resume_from))
        snapshot = load_beginning(choose_beginning(place), place, max_steps=4, new_horizon=True)
        known = snapshot.trainer["loggers"] if snapshot else None
        directory.mkdir(parents=True)
        with closing(open_run_log(directory, spec, total_steps=4, continue_at=0, loggers=known)) as log:
            steps = 4 if snapshot else 2
            train(make_run(directory, log, toy="mlp", checkpoints=place, training={"max_steps": steps}), snapshot)
        newest = list_checkpoints(directory / "checkpoints")[-1]
        assert load_snapshot(newest).trainer["loggers"]["wandb"] == {"id": sent_to[-1], "run": directory.name}
        if directory == here:
            newest.rename(tmp_path / "moved")
    assert len(sent_to) == 2 and (sent_to[0] == sent_to[1]) == is_same


def test_numbers_are_sent_under_their_kind_and_a_crash_is_told_from_an_end() -> None:
    sent: list[dict[str, Any]] = []

    class Run:
        log = staticmethod(sent.append)

    records: list[Record] = [
        {"kind": "train", "step": 3, "time": 1.0, "loss": 2.5, "name": "x"},
        {"kind": "message", "step": 3, "time": 1.0, "text": "hello"},
        {"kind": "norms", "step": 3, "time": 1.0, "weight_norm/a": 1.5, "gradient_norm": "NaN"},
    ]
    assert not _send(Run, records)
    assert sent == [{"step": 3, "train/loss": 2.5}, {"step": 3, "norms/weight_norm/a": 1.5}]
    assert _send(Run, [{"kind": "close", "step": 0, "time": 0.0}])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_offline_the_real_client_writes_and_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    spec = LoggingSpec(console="off", csv=False, plots=False, wandb="offline", wandb_artifacts=True)
    latest = tmp_path / "checkpoints" / "latest"
    latest.mkdir(parents=True)
    (latest / "model.safetensors").write_bytes(b"weights")
    for offset in (None, 0):
        log = open_run_log(tmp_path, spec, total_steps=3, continue_at=offset)
        for step in (1, 2, 3):
            log.write({"kind": "train", "step": step, "loss": 1.0 / step})
        log.close(timeout=120)
    assert not any("sink" in str(r.get("text")) for r in read_records(tmp_path / "metrics.jsonl"))
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    name = run_id(tmp_path / "wandb")
    assert len(files) == 2 and {file.name for file in files} == {f"run-{name}.wandb"}
    assert b"train/loss" in files[0].read_bytes() and b"-checkpoint" in files[0].read_bytes()


@pytest.fixture
def black_hole() -> Iterator[tuple[str, threading.Event]]:
    """A server that accepts every connection and never answers; the event says that somebody came."""
    came = threading.Event()
    held: list[socket.socket] = []
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def accept() -> None:
            while not ended.is_set():
                with suppress(TimeoutError):
                    held.append(server.accept()[0])
                    came.set()

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", came
        ended.set()
        thread.join()
    for connection in held:
        connection.close()


PROGRAM = """
import sys
from pathlib import Path
from trainkit.logging.run_log import open_run_log
from trainkit.logging.wandb import WandbSink
from trainkit.loop import train
from trainkit.specs import CheckpointSpec, LoggingSpec

spec, directory = LoggingSpec(console="off", csv=False, plots=False), Path(sys.argv[1])
sink = lambda: WandbSink(directory, LoggingSpec(wandb="online"), finish_seconds=2.0)
log = open_run_log(directory, spec, total_steps=10, sinks={"wandb": sink})
for step in range(30_000):
    log.write({"kind": "train", "step": step, "loss": 1.0})
log.close(1.0)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_server_that_never_answers_costs_nothing(tmp_path: Path, black_hole: tuple[str, threading.Event]) -> None:
    """More records than pipe and queue hold together: had the log waited for the client once, this would not end."""
    environment = {**os.environ, "WANDB_BASE_URL": black_hole[0], "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        out, _ = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "done\n")
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(30_000))
    assert "the wandb sink did not finish in time" in str(records[-2:])


@pytest.mark.slow
def test_the_other_process_ends_in_time_whatever_hangs(
    tmp_path: Path, black_hole: tuple[str, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, came = black_hole
    monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "86400")  # the client by itself would not give up
    sink = WandbSink(tmp_path, LoggingSpec(wandb="online"), finish_seconds=1.0)
    assert came.wait(60)
    with pytest.raises(RuntimeError, match=r"see .*output.txt"):
        sink.close()
