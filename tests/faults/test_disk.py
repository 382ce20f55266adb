"""A disk that fills up while a run trains, and has room again later; and a logger that never answers."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainkit.test_loop import ListLog, make_run, sha
from trainkit import checkpoint_writer
from trainkit.checkpoints import CheckpointStore, list_checkpoints
from trainkit.logging.run_log import FileLog, open_run_log
from trainkit.loop import train
from trainkit.specs import CheckpointSpec, LoggingSpec

QUIET = LoggingSpec(console="off", csv=False, plots=False)


def texts(folder: Path) -> list[str]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["text"] for record in records if record["kind"] == "message"]


def wide(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def test_a_run_on_a_disk_that_fills_up_trains_on_and_saves_when_it_can(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "FIRST_PAUSE", 0.05)
    filler, there = disk / "filler", dict[int, list[str]]()

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        """At step 12 somebody else fills the disk; at step 36 there is room again."""
        time.sleep(0.2)  # whatever is being written
        there[step] = [path.name for path in list_checkpoints(disk / "checkpoints")]
        if step == 12:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(free))  # not even the records have room
        if step == 36:
            filler.unlink()
        return {"val_loss": 1.0}

    def run(folder: Path, log: FileLog | ListLog) -> Any:
        store = CheckpointStore(folder / "checkpoints", CheckpointSpec(keep_last=1))
        training = {"max_steps": 48, "log_every": 1, "eval_every": 6, "save_every": 6}
        return make_run(folder, log, toy="mlp", model=wide(), training=training, evaluate=evaluate, checkpoints=store)

    with closing(open_run_log(disk, QUIET, total_steps=48)) as log:
        result = train(run(disk, log))
    assert (result.status, result.step) == ("finished", 48)
    assert there[30] == there[36] and len(there[36]) >= 1  # the old one stayed, nothing else came
    assert "step-00000048" in [path.name for path in list_checkpoints(disk / "checkpoints")]
    told = texts(disk)
    assert any("No space left on device" in text and "training goes on" in text for text in told), told
    train(run(tmp_path / "free", ListLog()))
    assert sha(disk / "checkpoints") == sha(tmp_path / "free" / "checkpoints")


def test_a_logger_that_never_answers_changes_nothing(tmp_path: Path) -> None:
    class Silent:
        def write(self, record: Any) -> None:
            threading.Event().wait()

        def close(self) -> None: ...

    log = open_run_log(tmp_path, QUIET, total_steps=30, sinks={"silent": Silent})
    result = train(make_run(tmp_path / "checkpoints", log, training={"log_every": 1}))
    log.close(timeout=0.1)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result.status == "finished"
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 31))
    assert "silent sink did not finish" in texts(tmp_path)[-1]
