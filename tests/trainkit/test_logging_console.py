"""The console: JSON that pipes on, a live line that fits the terminal, and no reader that can stop a run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.logging.console import Progress, format_duration, format_rate
from trainkit.logging.records import Record

PROGRAM = """
import sys, time
from contextlib import closing
from pathlib import Path
from trainkit.logging.run_log import open_run_log
from trainkit.specs import LoggingSpec

directory, kind, steps, timeout = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
quiet = float(sys.argv[5])
log = open_run_log(directory, LoggingSpec(console=kind, csv=False, plots=False), total_steps=steps)
log.message("begin")
time.sleep(quiet)
for step in range(1, steps + 1):
    log.write({"kind": "train", "step": step, "loss": 3.0 / step, "learning_rate": 3e-4, "tokens_per_second": 81920.0,
               "step_seconds": 0.25})
log.write({"kind": "eval", "step": steps, "val_loss": 1.25})
log.write({"kind": "sample", "step": steps, "text": "Once [bold]upon[/bold] \\x1b[2J\\u65e5 :smile:"})
log.message("end")
log.close(timeout)
"""


def start(
    directory: Path, kind: str, steps: int, stdout: int, timeout: float = 240.0, quiet: float = 0.0
) -> subprocess.Popen[str]:
    """A process that logs; `quiet` seconds pass before the first step."""
    command = [sys.executable, "-c", PROGRAM, str(directory), kind, str(steps), str(timeout), str(quiet)]
    environment = {**os.environ, "TERM": "xterm-256color"}
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("kind", ["auto", "json"])
def test_in_a_pipe_every_line_is_a_record(tmp_path: Path, kind: str) -> None:
    with start(tmp_path, kind, 20, subprocess.PIPE) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out == (tmp_path / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["kind"] for r in records] == ["message", *["train"] * 20, "eval", "sample", "message"]


def test_off_says_nothing(tmp_path: Path) -> None:
    with start(tmp_path, "off", 3, subprocess.PIPE) as process:
        assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path: Path) -> None:
    with start(tmp_path, "json", 3000, subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    content = (tmp_path / "metrics.jsonl").read_text()
    assert content.count('"train"') == 3000
    assert content.count("the console sink failed and is switched off (BrokenPipeError") == 1


@pytest.mark.parametrize("kind", ["json", "live"])
def test_a_reader_that_does_not_read_does_not_stop_the_run(tmp_path: Path, kind: str) -> None:
    """The pipe fills, the sink's thread blocks in it for ever, and the process still ends, and well."""
    reader, writer = os.pipe()
    with start(tmp_path, kind, 3000, writer, timeout=0.5) as process:
        os.close(writer)
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.wait()
    os.close(reader)
    assert process.returncode == 0
    content = (tmp_path / "metrics.jsonl").read_text()
    assert content.count('"train"') == 3000
    if kind == "json":
        assert "the console sink did not finish in time" in content


def run_on_terminal(directory: Path, kind: str, steps: int, width: int, quiet: float = 0.0) -> str:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with start(directory, kind, steps, terminal, quiet=quiet) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(main, 65536):
                shown += chunk
        except OSError:  # how Linux reports that the other side is closed
            pass
        assert process.stderr is not None
        assert process.stderr.read() == ""
    os.close(main)
    assert process.returncode == 0
    return shown.decode()


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_terminal_shows_progress_and_what_happened(tmp_path: Path, width: int) -> None:
    shown = run_on_terminal(tmp_path, "auto", 600, width)  # fewer than a queue holds: all are shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    lines = [line.rstrip() for line in plain.replace("\r", "\n").split("\n") if line.strip()]
    assert lines[-1].startswith("step 600/600 ━")
    assert "loss 0.0050" in lines[-1] and "val 1.2500" in lines[-1] and len(lines[-1]) < width
    assert ("81.9k tokens/s" in lines[-1]) == (width > 60) and ("lr 3.00e-04" in lines[-1]) == (width > 60)
    assert "eta" not in lines[-1] and not any(line.startswith("step 0/") for line in lines[2:])
    assert "begin" in lines and "end" in lines
    assert "step 600  eval  val_loss 1.25" in lines
    # A sample is text: no markup, no emoji, and no command to the terminal.
    assert "Once [bold]upon[/bold] \ufffd[2J日 :smile:" in plain
    assert shown.rindex("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_the_line_moves_before_there_is_anything_to_say(tmp_path: Path) -> None:
    shown = run_on_terminal(tmp_path, "auto", 2, 100, quiet=4.0)
    frames = set(re.findall(r"([\u2800-\u28ff]) step 0/2 ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)))
    assert len(frames) > 1  # a spinner that turned
    assert "step 2/2" in shown


step = st.integers(0, 10**9)
number = st.none() | st.floats(0, 1e15) | st.sampled_from(["NaN", "Infinity"])


@given(
    st.integers(60, 250),
    st.lists(
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["train", "eval", "message"]), "step": step, "time": st.floats(0, 1e10)},
            optional={
                "loss": number,
                "val_loss": number,
                "learning_rate": number,
                "tokens_per_second": number,
                "step_seconds": number,
            },
        ),
        max_size=4,
    ),
)
def test_the_line_always_fits(width: int, records: list[Record]) -> None:
    progress = Progress(10**9)
    for record in records:
        progress.update(record)
    before, bar, after = progress.line(width)
    assert bar >= 1
    assert len(before) + bar + len(after) < width


def test_time_left_is_the_mean_speed(tmp_path: Path) -> None:
    progress = Progress(100)
    progress.update({"kind": "train", "step": 10, "time": 1000.0, "step_seconds": 2.0})
    assert progress.facts() == ["eta 3:00"]
    progress.update({"kind": "train", "step": 30, "time": 1020.0, "step_seconds": 0.1})
    assert progress.facts() == ["eta 1:10"]


def test_durations_and_rates() -> None:
    assert [format_duration(s) for s in (0, 7, 754, 18367, 183845)] == [
        "0:00", "0:07", "12:34", "5:06:07", "2d 03:04:05"
    ]  # fmt: skip
    assert [format_rate(r) for r in (0.5, 950, 12345, 999_600, 4.56e6, 2e9)] == [
        "0.5", "950", "12.3k", "1000k", "4.56M", "2G"
    ]  # fmt: skip
