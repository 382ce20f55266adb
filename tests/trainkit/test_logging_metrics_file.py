"""The metrics file loses nothing: not at a kill, not at a full disk, not when a run goes back to a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.logging.jsonl import MetricsFile, attempts
from trainkit.logging.records import Record, read_records, stamp


def record(step: int) -> Record:
    return stamp({"kind": "train", "step": step, "loss": 1 / (step + 3)})


def write_steps(path: Path, steps: range) -> list[int]:
    """Append records and return the offset before each of them, and the last."""
    file = MetricsFile(path)
    offsets = [file.offset]
    for step in steps:
        file.write(record(step))
        offsets.append(file.offset)
        assert path.stat().st_size == file.offset == file.sync()  # nothing waits in a buffer
    file.close()
    return offsets


def steps_of(path: Path) -> list[object]:
    return [r["step"] for r in read_records(path)]


def continue_at(path: Path, offset: int) -> Path | None:
    file = MetricsFile(path)
    kept = file.continue_at(offset)
    file.close()
    return kept


def test_what_came_after_the_checkpoint_moves_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    offsets = write_steps(path, range(10))
    assert continue_at(path, offsets[6]) == tmp_path / "metrics.attempt-1.jsonl"
    assert write_steps(path, range(6, 8))[0] == offsets[6]
    assert steps_of(path) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert steps_of(tmp_path / "metrics.attempt-1.jsonl") == [6, 7, 8, 9]
    assert continue_at(path, offsets[2]) == tmp_path / "metrics.attempt-2.jsonl"
    assert steps_of(tmp_path / "metrics.attempt-2.jsonl") == [2, 3, 4, 5, 6, 7]
    assert continue_at(path, offsets[2]) is None  # nothing to keep
    assert continue_at(path, 0) == tmp_path / "metrics.attempt-3.jsonl"
    assert path.read_bytes() == b""


def test_attempts_are_in_numerical_order(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"metrics.attempt-{number}.jsonl").touch()
    assert [p.name for p in attempts(tmp_path / "metrics.jsonl")] == [
        f"metrics.attempt-{number}.jsonl" for number in (1, 2, 10)
    ]
    write_steps(tmp_path / "metrics.jsonl", range(1))
    assert continue_at(tmp_path / "metrics.jsonl", 0) == tmp_path / "metrics.attempt-11.jsonl"


@settings(max_examples=40, deadline=None)
@given(written=st.integers(0, 6), torn=st.integers(0, 30), offset=st.integers(0, 700))
def test_wherever_it_is_cut_no_byte_is_lost(
    tmp_path_factory: pytest.TempPathFactory, written: int, torn: int, offset: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write_steps(path, range(written))
    with path.open("ab") as file:
        file.write(json.dumps(record(99)).encode()[:torn])  # a kill in the middle of a write
    before = path.read_bytes()
    kept = continue_at(path, offset)
    after = path.read_bytes()
    assert after + (kept.read_bytes() if kept else b"") == before
    assert len(after) <= offset
    assert after == b"" or after.endswith(b"\n")
    assert before[len(after) : offset].count(b"\n") == 0  # no whole line before the offset is given up
    write_steps(path, range(1))
    assert steps_of(path)[-1] == 0


def test_a_kill_between_keeping_and_cutting_keeps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    offsets = write_steps(path, range(4))
    before = path.read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", die)
        with pytest.raises(KeyboardInterrupt):
            continue_at(path, offsets[1])
    assert path.read_bytes() == before
    assert continue_at(path, offsets[1]) == tmp_path / "metrics.attempt-1.jsonl"
    assert [p.name for p in attempts(path)] == ["metrics.attempt-1.jsonl"]
    assert steps_of(path) == [0]


def test_a_kill_loses_no_written_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys, itertools\n"
        "from trainkit.logging.jsonl import MetricsFile\n"
        "file = MetricsFile(sys.argv[1])\n"
        "for step in itertools.count():\n"
        "    file.write({'kind': 'train', 'step': step, 'time': 0.0})\n"
        "    if step % 100 == 0: print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
    steps = steps_of(path)
    assert steps == list(range(len(steps)))
    assert len(steps) > told[-1]


WITHOUT_ROOM = """
import resource, signal, sys
from trainkit.errors import UserError
from trainkit.logging.jsonl import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
file = MetricsFile(sys.argv[1])
for step in range(100):
    file.write({'kind': 'train', 'step': step, 'time': 0.0, 'loss': 0.1})
print(bool(file.trouble), open(sys.argv[1], 'rb').read().endswith(b'\\n'))
if sys.argv[2] == 'room again':
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    file.write({'kind': 'train', 'step': 100, 'time': 0.0, 'loss': 0.1})
    print(bool(file.trouble), file.offset == file.sync())
try:
    file.close()
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("end", ["room again", "no room"])
def test_records_wait_while_the_disk_is_full_and_none_is_cut_or_lost(tmp_path: Path, end: str) -> None:
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", WITHOUT_ROOM, str(path), end]
    result = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert result[0] == "True True"
    if end == "room again":
        assert result[1:] == ["False True"]
        assert steps_of(path) == list(range(101))
    else:
        kept = steps_of(path)
        assert kept == list(range(len(kept))) and 10 < len(kept) < 100
        assert result[1].startswith(f"cannot write the last {100 - len(kept)} records of {path}")
