"""What a run shows while it goes: live progress on a terminal, otherwise JSON lines that pipe into `jq`.

Both write past the buffer of `sys.stdout`: a reader that stops reading then blocks a sink's thread and nothing else. (A
thread that hangs while it holds that buffer's lock makes the interpreter abort at exit.)
"""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Literal, TextIO
from unicodedata import category

from trainkit.logging.records import Record, Scalar, describe, encode_record, throughput
from trainkit.logging.sinks import SinkOpener

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.spinner import Spinner

REFRESHES_PER_SECOND = 2
"""The line moves while nothing is recorded, too; each drawing takes a millisecond or two of the interpreter."""
QUIET_KINDS = ("train", "norms")
"""What moves the line and says nothing above it."""
BAR_WIDTHS = (10, 40)
"""The bar gives way down to the first, so that facts fit; more than the second is only decoration."""


def console_sink(kind: Literal["auto", "live", "json"], total_steps: int) -> SinkOpener:
    """What opens the console sink on the standard output of this moment."""
    stream = sys.stdout
    if kind == "live" or (kind == "auto" and stream.isatty()):
        return lambda: LiveConsole(stream, total_steps)
    return lambda: JsonConsole(stream)


class JsonConsole:
    """One line for each record, messages included."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        stream.flush()

    def write(self, record: Record) -> None:
        line = encode_record(record)
        descriptor = _descriptor(self._stream)
        if descriptor is None:
            self._stream.write(line.decode("ascii"))
            return
        while line:  # a pipe may take a part
            line = line[os.write(descriptor, line) :]

    def close(self) -> None:
        pass


class LiveConsole:
    """A line of progress at the bottom; validations, checkpoints, samples and messages scroll above it."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        # Imported by the sink's thread: a run that does not show progress never waits for it.
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        # A buffer of its own; see above.
        self._file = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors="replace")
        self._console = Console(file=self._file, highlight=False, markup=False, emoji=False)
        self._total_steps = total_steps
        self._progress = Progress(total_steps)
        self._spinner: Spinner | None = Spinner("dots")
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        # Visible all the time, since a killed run could not bring it back.
        self._console.show_cursor(True)

    def write(self, record: Record) -> None:
        self._progress.update(record)
        if record["kind"] not in QUIET_KINDS:
            self._console.print(_printable(describe(record)), soft_wrap=True)  # draws the line anew too

    def close(self) -> None:
        self._spinner = None
        self._live.stop()  # draws the line once more
        self._file.close()

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        before, bar_width, after = self._progress.line(self._console.width - (2 if self._spinner else 0))
        bar = ProgressBar(self._total_steps, self._progress.step, width=bar_width)
        row = Table.grid()
        row.add_row(*((self._spinner, " ") if self._spinner else ()), before, bar, after)
        return row


class Progress:
    """The line of progress: a bar, and as many facts, most important first, as the width has room for."""

    def __init__(self, total_steps: int) -> None:
        self.step = 0
        self._total = total_steps
        self._train: Record = {}
        self._validation: Record = {}
        self._first: Record | None = None

    def update(self, record: Record) -> None:
        self.step = max(self.step, int(record["step"] or 0))
        if record["kind"] == "train":
            self._train = record
            self._first = self._first or record
        elif record["kind"] == "eval":
            self._validation = record

    def facts(self) -> list[str]:
        """In order of importance."""
        rate = throughput(self._train)
        left = self._seconds_left()
        parts = [
            _fact("loss {:.4f}", self._train.get("loss")),
            f"eta {format_duration(left)}" if left is not None else "",
            _fact("val {:.4f}", self._validation.get("val_loss")),
            f"{format_rate(rate[1])} {rate[0]}/s" if rate else "",
            _fact("lr {:.2e}", self._train.get("learning_rate")),
        ]
        return [part for part in parts if part]

    def line(self, width: int) -> tuple[str, int, str]:
        """What stands before the bar, how wide the bar is, what stands after it."""
        before = f"step {self.step:,}/{self._total:,} "
        after = ""
        for fact in self.facts():
            if len(before) + BAR_WIDTHS[0] + len(after) + 2 + len(fact) < width:
                after += "  " + fact
        return before, max(1, min(BAR_WIDTHS[1], width - 1 - len(before) - len(after))), after

    def _seconds_left(self) -> float | None:
        """From the mean speed since the first record (which may hold compilation), validations included."""
        if self._first is None or self.step >= self._total:
            return None
        steps = int(self._train["step"] or 0) - int(self._first["step"] or 0)
        seconds = float(self._train["time"] or 0) - float(self._first["time"] or 0)
        each = seconds / steps if steps > 0 else float(self._train.get("step_seconds") or "nan")
        return each * (self._total - self.step) if math.isfinite(each) else None


def format_duration(seconds: float) -> str:
    """`0:07`, `12:34`, `5:06:07`, `2d 03:04:05`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(rate: float) -> str:
    """Three digits: `950`, `12.3k`, `4.56M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{letter}" if rate < 999.5 * size else f"{rate / size:.0f}{letter}"
    return f"{rate:.3g}"


def _fact(form: str, value: Scalar) -> str:
    return "" if value is None else form.format(float(value))


def _printable(text: str) -> str:
    """Without control characters: what a model samples must not steer the terminal."""
    return "".join(c if c in "\n\t" or category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text)


def _descriptor(stream: TextIO) -> int | None:
    """The operating system's number of a stream; `None` for one that lives in memory."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
