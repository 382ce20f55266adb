"""A view that hangs, raises or crawls costs the run nothing but that view."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainkit.errors import UserError
from trainkit.logging.records import Record, read_records
from trainkit.logging.run_log import FileLog, NullLog, open_run_log
from trainkit.logging.sinks import BackgroundSink, Sink, SinkOpener
from trainkit.specs import LoggingSpec

QUIET = LoggingSpec(console="off", csv=False, plots=False)


class Collector:
    """A sink that keeps what it gets; `gate` holds it back, `fail_at` breaks it."""

    def __init__(self, gate: threading.Event | None = None, fail_at: int = -1) -> None:
        self.records: list[Record] = []
        self.closed = False
        self._gate = gate
        self._fail_at = fail_at

    def write(self, record: Record) -> None:
        if self._gate is not None:
            self._gate.wait()
        if record["step"] == self._fail_at:
            raise OSError("no route to host")
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end of the test, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()


def messages(directory: Path) -> list[str]:
    return [str(r["text"]) for r in read_records(directory / "metrics.jsonl") if r["kind"] == "message"]


def write_steps(log: FileLog, count: int) -> None:
    for step in range(count):
        log.write({"kind": "train", "step": step, "loss": 1.0})


def fail_to_open() -> Sink:
    raise ConnectionError


def test_records_arrive_in_order_with_their_time(tmp_path: Path) -> None:
    collector = Collector()
    log = FileLog(tmp_path, {"collector": lambda: collector})
    write_steps(log, 500)
    log.message("done")
    log.close()
    assert collector.closed
    assert collector.records == list(read_records(tmp_path / "metrics.jsonl"))
    assert [r["step"] for r in collector.records] == [*range(500), 499]
    assert collector.records[-1]["text"] == "done"


def test_a_sink_that_hangs_costs_only_itself(tmp_path: Path, gate: threading.Event) -> None:
    healthy = Collector()

    def open_late() -> Sink:
        gate.wait()
        return Collector()

    openers: dict[str, SinkOpener] = {
        "hanging": lambda: Collector(gate),
        "never opened": open_late,
        "healthy": lambda: healthy,
    }
    log = FileLog(tmp_path, openers)
    # Far more than a queue holds. If the log waited for a hanging sink once, this would never end.
    write_steps(log, 5000)
    log.close(timeout=3.0)  # enough for the healthy one
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(5000))
    told = "\n".join(messages(tmp_path))
    assert "the hanging sink did not finish in time" in told and "the never opened sink did not finish" in told
    assert "the hanging sink was too slow and missed" in told
    assert "healthy sink did not" not in told


def test_a_sink_that_raises_is_reported_once_and_switched_off(tmp_path: Path) -> None:
    broken, healthy = Collector(fail_at=3), Collector()
    log = FileLog(tmp_path, {"broken": lambda: broken, "unreachable": fail_to_open, "healthy": lambda: healthy})
    write_steps(log, 100)
    log.close()
    assert [r["step"] for r in broken.records if r["kind"] == "train"] == [0, 1, 2] and not broken.closed
    assert [r["step"] for r in healthy.records if r["kind"] == "train"] == list(range(100))
    assert sorted(messages(tmp_path)) == [
        "the broken sink failed and is switched off (OSError: no route to host)",
        "the unreachable sink failed and is switched off (ConnectionError)",
    ]
    assert "no route to host" in (tmp_path / "log.txt").read_text()


def test_what_does_not_fit_the_queue_is_counted(gate: threading.Event) -> None:
    collector = Collector(gate)
    sink = BackgroundSink("slow", lambda: collector, queue_size=4)
    for step in range(20):
        sink.write({"kind": "train", "step": step, "time": 0.0})
    sink.ask_to_close()
    gate.set()
    sink.wait_closed(deadline=time.monotonic() + 60)
    assert collector.closed
    assert len(collector.records) + sink.dropped == 20 and sink.dropped >= 15
    assert [r["step"] for r in collector.records][-3:] == [17, 18, 19]  # the newest are kept
    assert sink.problems() == [f"the slow sink was too slow and missed {sink.dropped} records"]
    assert sink.problems() == []


def test_a_resumed_log_continues_at_the_checkpoint(tmp_path: Path) -> None:
    log = open_run_log(tmp_path, QUIET, total_steps=10)
    log.message("begin")
    log.write({"kind": "train", "step": 1, "loss": 2.0})
    offset = log.offset
    log.write({"kind": "train", "step": 2, "loss": 1.9})
    log.close()
    log = open_run_log(tmp_path, QUIET, total_steps=10, continue_at=offset)
    assert log.offset > offset  # it says what moved where
    log.write({"kind": "train", "step": 2, "loss": 1.8})
    log.close()
    kinds = [(r["kind"], r["step"], r.get("loss")) for r in read_records(tmp_path / "metrics.jsonl")]
    assert kinds == [("message", 0, None), ("train", 1, 2.0), ("message", 1, None), ("train", 2, 1.8)]
    moved = list(read_records(tmp_path / "metrics.attempt-1.jsonl"))
    assert [r.get("loss") for r in moved] == [1.9]
    text = (tmp_path / "log.txt").read_text()
    assert "begin" in text and "moved to metrics.attempt-1.jsonl" in text
    assert text.index("loss 1.9") < text.index("loss 1.8")  # the text keeps everything, in the order it happened


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        FileLog(tmp_path / "absent", {})


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = NullLog()
    log.write({"kind": "train", "step": 1})
    log.message("hello")
    assert log.offset == 0
    log.close()
    assert list(tmp_path.iterdir()) == []
