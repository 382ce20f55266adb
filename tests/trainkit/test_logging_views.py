"""The file views say what `metrics.jsonl` says, however they were made."""

from __future__ import annotations

import csv
import re
from contextlib import closing
from pathlib import Path

import pytest

from trainkit.logging.csv import CsvSink
from trainkit.logging.jsonl import MetricsFile
from trainkit.logging.records import Record, read_records, stamp
from trainkit.logging.run_log import FileLog, open_run_log
from trainkit.logging.samples import SamplesSink
from trainkit.logging.tensorboard import TensorboardSink
from trainkit.specs import LoggingSpec

SPEC = LoggingSpec(console="off", csv=True, plots=False)


def write_run(log: FileLog, steps: range) -> None:
    """Train records, later with one more metric, validations with names of their own, texts of all kinds."""
    for step in steps:
        log.write({"kind": "train", "step": step, "loss": 1 / (step + 3)} | ({"late": step * 0.1} if step > 4 else {}))
        if step % 3 == 0:
            log.write({"kind": "eval", "step": step, "val_loss": 2 / (step + 3), "flag": True})
        if step % 5 == 0:
            log.write({"kind": "sample", "step": step, "prompt": "Once", "text": f"upon, a\n```\n{step}"})
            log.message('a "quoted", message')
    log.write({"kind": "train", "step": steps[-1] + 1, "loss": float("nan"), "name": 'x,"y"\nz', "nothing": None})


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected_rows(path: Path) -> list[dict[str, str]]:
    records = [r for r in read_records(path) if r["kind"] not in ("message", "sample")]
    columns = list(dict.fromkeys(name for r in records for name in r)) or ["kind", "step", "time"]
    return [
        {name: "" if r.get(name) is None else repr(r[name]) if isinstance(r[name], float) else str(r[name])
         for name in columns}
        for r in records
    ]  # fmt: skip


def test_the_table_is_the_metrics(tmp_path: Path) -> None:
    log = open_run_log(tmp_path, SPEC, total_steps=20)
    write_run(log, range(12))
    log.close()
    rows = csv_rows(tmp_path / "metrics.csv")
    assert rows == expected_rows(tmp_path / "metrics.jsonl")
    assert len(rows) == 12 + 4 + 1
    assert [float(row["loss"]) for row in rows if row["kind"] == "train"][:12] == [1 / (s + 3) for s in range(12)]
    assert list(rows[0]) == ["kind", "step", "time", "loss", "val_loss", "flag", "late", "name", "nothing"]


def test_the_table_is_right_at_every_moment(tmp_path: Path) -> None:
    """Also before it is closed, and when the sink sees only some of the records."""
    metrics, table = tmp_path / "metrics.jsonl", tmp_path / "metrics.csv"
    log = FileLog(tmp_path, {})
    sink = CsvSink(metrics, table)
    assert csv_rows(table) == []
    for first in range(0, 40, 8):
        write_run(log, range(first, first + 8))
        sink.write({})
        assert csv_rows(table) == expected_rows(metrics)
        assert csv_rows(table)
    sink.close()
    log.close()
    assert csv_rows(table) == expected_rows(metrics)


def test_a_record_that_is_half_written_waits(tmp_path: Path) -> None:
    metrics, table = tmp_path / "metrics.jsonl", tmp_path / "metrics.csv"
    metrics.touch()
    sink = CsvSink(metrics, table)
    line = b'{"kind": "train", "step": 1, "time": 0.0, "loss": 0.5}\n'
    for size in (10, len(line)):
        metrics.write_bytes(line[:size])
        sink.write({})
        assert csv_rows(table) == (expected_rows(metrics) if size == len(line) else [])


def test_views_forget_what_a_resume_forgets(tmp_path: Path) -> None:
    log = open_run_log(tmp_path, SPEC, total_steps=20)
    write_run(log, range(5))
    offset = log.offset
    write_run(log, range(5, 12))
    log.close()
    assert "## Step 10" in (tmp_path / "samples.md").read_text()
    log = open_run_log(tmp_path, SPEC, total_steps=20, continue_at=offset)
    write_run(log, range(5, 7))
    log.close()
    assert csv_rows(tmp_path / "metrics.csv") == expected_rows(tmp_path / "metrics.jsonl")
    assert re.findall("## Step .*", (tmp_path / "samples.md").read_text()) == ["## Step 0", "## Step 5"]


def test_samples_read_as_they_were_made(tmp_path: Path) -> None:
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "samples.md"
    file = MetricsFile(metrics)
    sink = SamplesSink(metrics, path)
    texts = ["# not a title", "```python\n1\n```", "", "````"]
    for step, text in enumerate(texts):
        record = stamp({"kind": "sample", "step": step // 2, "prompt": "Once", "text": text})
        file.write(record)
        sink.write(record)
    file.close()
    sink.close()
    written = path.read_text()
    assert re.findall(r"^## .*$", written, re.M) == ["## Step 0", "## Step 1"]
    assert re.findall(r"^(`{3,})text\n(.*?)\n\1$", written, re.M | re.S) == [
        ("```", texts[0]), ("````", texts[1]), ("```", texts[2]), ("`````", texts[3])
    ]  # fmt: skip
    assert written.count("prompt: Once") == 4


def test_the_text_log_has_a_line_for_each_record_with_its_time(tmp_path: Path) -> None:
    log = FileLog(tmp_path, {})
    log.write({"kind": "eval", "step": 1000, "val_loss": 2.5})
    log.message("saved")
    log.write({"kind": "sample", "step": 1000, "text": "long\ntext"})
    log.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines] == [
        "step 1,000  eval  val_loss 2.5",
        "saved",
    ]


def test_plots_are_drawn_by_the_end(tmp_path: Path) -> None:
    log = open_run_log(tmp_path, LoggingSpec(console="off", csv=False, plots=True), total_steps=20)
    write_run(log, range(12))
    log.close()
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not any("sink" in str(r.get("text")) for r in read_records(tmp_path / "metrics.jsonl"))
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records: list[Record] = [
        {"kind": "train", "step": 1, "time": 5.0, "loss": 0.5, "name": "x"},
        {"kind": "eval", "step": 1, "time": 6.0, "val_loss": 0.25},
        {"kind": "train", "step": 2, "time": 7.0, "loss": "NaN"},
        {"kind": "message", "step": 2, "time": 8.0, "text": "hello"},
    ]
    sink = TensorboardSink(tmp_path)
    for record in records:
        sink.write(record)
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "eval/val_loss"]
    assert [(e.step, e.wall_time, e.value) for e in events.Scalars("train/loss")] == [(1, 5.0, 0.5)]


def test_tensorboard_is_a_setting_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = LoggingSpec(console="off", csv=False, plots=False, tensorboard=True)
    offset = None
    for steps in ((1, 2, 3), (3, 4)):
        with closing(open_run_log(tmp_path, spec, total_steps=4, continue_at=offset)) as log:
            for step in steps:
                log.write({"kind": "train", "step": step, "loss": 10.0 * step})
                offset = log.offset if step == 2 else offset
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 10), (2, 20), (3, 30), (4, 40)]
