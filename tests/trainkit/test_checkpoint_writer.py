"""Saving in the background: the loop never shares tensors with it, a bad disk never stops it, the end waits for it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit import artifacts, checkpoint_writer
from trainkit.checkpoint_writer import CheckpointWriter
from trainkit.checkpoints import CheckpointStore, Snapshot, list_checkpoints, load_snapshot
from trainkit.errors import UserError
from trainkit.specs import CheckpointSpec


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "FIRST_PAUSE", 0.01)


def store(root: Path, **changes: Any) -> CheckpointStore:
    return CheckpointStore(root, CheckpointSpec(keep_last=9), **changes)


def state(step: int, size: int = 4) -> Snapshot:
    return Snapshot({"step": step}, {"weight": torch.full((size,), float(step))})


def steps(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(root)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Generator[threading.Event]:
    """Publications wait at their seal until it is set."""
    event = threading.Event()
    monkeypatch.setattr(artifacts, "step_hook", lambda stage: stage != "seal" or event.wait())
    yield event
    event.set()


def fail_times(monkeypatch: pytest.MonkeyPatch, times: int, error: BaseException, stage: str = "fsync") -> None:
    left = [times]

    def hook(at: str) -> None:
        if at == stage and left[0]:
            left[0] -= 1
            raise error

    monkeypatch.setattr(artifacts, "step_hook", hook)


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointWriter(store(tmp_path)) as writer:
        snapshot = state(1)
        writer.save(snapshot)
        snapshot.model["weight"].add_(100)  # the next training step
        snapshot.trainer["step"] = 2
        assert steps(tmp_path) == []
        gate.set()
    assert steps(tmp_path) == [1] and writer.newest is not None
    assert load_snapshot(writer.newest).model["weight"].tolist() == [1.0] * 4
    assert writer.messages() == []


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointWriter(store(tmp_path)) as writer:
        writer.save(state(1))
        threading.Timer(0.1, gate.set).start()
        writer.save(state(2))
        assert 1 in steps(tmp_path)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("stage", ["write", "fsync", "rename", "verify", "prune"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, code: int
) -> None:
    saved: list[int] = []
    place = CheckpointStore(tmp_path, CheckpointSpec(keep_last=1), saved=saved.append)
    with CheckpointWriter(place) as writer:
        writer.save(state(1))
        writer.wait()
        fail_times(monkeypatch, 2, OSError(code, os.strerror(code)), stage)
        writer.save(state(2))
        while len(saved) < 2:
            pass
    assert steps(tmp_path) == [2]
    told = writer.messages()
    assert len(told) == 3 and os.strerror(code) in told[0] and "training goes on" in told[0]
    assert told[2] == "the checkpoint of step 2 is saved now"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_a_newer_state_takes_the_place_of_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "FIRST_PAUSE", 60.0)
    fail_times(monkeypatch, 1, OSError(errno.ENOSPC, "full"))
    with CheckpointWriter(store(tmp_path)) as writer:
        writer.save(state(1))
        writer.save(state(2))
    assert steps(tmp_path) == [2]


def test_what_cannot_be_written_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_times(monkeypatch, 99, OSError(errno.ENOSPC, "No space left on device"))
    with (
        pytest.raises(UserError, match=r"cannot write .*step-00000001: No space left"),
        CheckpointWriter(store(tmp_path)) as writer,
    ):
        writer.save(state(1))
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_program_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def broken(directory: Path) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"), CheckpointWriter(store(tmp_path, write_assets=broken)) as writer:
        writer.save(state(1))


def test_a_disk_that_is_really_full_keeps_the_good_checkpoint_and_takes_the_next_when_there_is_room(
    disk: Path,
) -> None:
    (disk / "other").write_bytes(bytes(360_000))
    with CheckpointWriter(store(disk / "checkpoints")) as writer:
        writer.save(state(1, size=20_000))  # 80 kB
        writer.save(state(2, size=20_000))
        writer.wait()
        assert steps(disk / "checkpoints") == [1]
        assert [path.name for path in (disk / "checkpoints").iterdir() if path.name.startswith(".")] == []
        (disk / "other").unlink()
    assert steps(disk / "checkpoints") == [1, 2]
    assert "No space left on device" in writer.messages()[0]
