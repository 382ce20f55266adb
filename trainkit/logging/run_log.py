"""The log of a run: the first rank's writes `metrics.jsonl` and feeds the views, the other ranks' swallows everything.

with closing(open_run_log(directory, spec, total_steps=1000) if world.is_main else NullLog()) as log:
    log.write({"kind": "train", "step": 10, "loss": 2.4})
    log.message("saved")
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainkit.artifacts import remove_leftovers
from trainkit.logging.console import console_sink
from trainkit.logging.csv import CSV_FILE, CsvSink
from trainkit.logging.jsonl import METRICS_FILE, MetricsFile
from trainkit.logging.plotting import PLOTS_DIRECTORY, PlotSink
from trainkit.logging.records import Record, Scalar, decode_record, describe, read_records, stamp
from trainkit.logging.samples import SAMPLES_FILE, SamplesSink
from trainkit.logging.sinks import BackgroundSink, SinkOpener
from trainkit.logging.tensorboard import TENSORBOARD_DIRECTORY, TensorboardSink
from trainkit.logging.wandb import WandbSink, identity
from trainkit.specs import LoggingSpec

TEXT_FILE = "log.txt"
CLOSE_SECONDS = 30.0
"""The most that views may hold up the end of a run, all of them together."""


class NullLog:
    """The log of every rank but the first."""

    offset = 0
    loggers: Mapping[str, Any] = {}

    def write(self, record: Mapping[str, Scalar]) -> None:
        pass

    def message(self, text: str, step: int | None = None) -> None:
        pass

    def close(self) -> None:
        pass


class FileLog:
    """Writes each record to `metrics.jsonl` and `log.txt` at once, then hands it to the sinks."""

    def __init__(
        self,
        directory: Path,
        sinks: Mapping[str, SinkOpener],
        *,
        continue_at: int | None = None,
        loggers: Mapping[str, Any] | None = None,
    ) -> None:
        self.loggers = dict(loggers or {})
        remove_leftovers(directory)
        self._metrics = MetricsFile(directory / METRICS_FILE)
        self._text_path = directory / TEXT_FILE
        abandoned = None if continue_at is None else self._metrics.continue_at(continue_at)
        self._step = _last_step(self._metrics.path)
        # Only now: file views begin by reading the metrics file.
        self._sinks = [BackgroundSink(name, opener) for name, opener in sinks.items()]
        # After a clean stop only its last words stand behind the checkpoint: nothing that anyone could miss.
        if abandoned is not None and any(record["kind"] != "message" for record in read_records(abandoned)):
            self.message(f"what was logged after the checkpoint moved to {abandoned.name}")

    def write(self, record: Mapping[str, Scalar]) -> None:
        """Record it, with the present time. Raises `UserError` only when `metrics.jsonl` cannot be written at all."""
        before = self._metrics.trouble
        self._record(stamp(record))
        if self._metrics.trouble and not before:
            self.message(f"{self._metrics.trouble}: training goes on, records wait in memory until there is room")
        for sink in self._sinks:
            for problem in sink.problems():
                self.message(problem)

    def message(self, text: str, step: int | None = None) -> None:
        """Tell people something, after `step` steps; None = those of the last record."""
        self.write({"kind": "message", "step": self._step if step is None else step, "text": text})

    @property
    def offset(self) -> int:
        """Bytes of `metrics.jsonl`, flushed to the disk: what a checkpoint records."""
        return self._metrics.sync()

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Let the views finish, for `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.ask_to_close()
        for sink in sinks:
            sink.wait_closed(deadline)
        for problem in [problem for sink in sinks for problem in sink.problems()]:
            self.message(problem)
        self._metrics.close()

    def _record(self, record: Record) -> None:
        self._step = int(record["step"] or 0)
        self._metrics.write(record)
        if record["kind"] not in ("sample", "norms"):
            with suppress(OSError), self._text_path.open("a", encoding="utf-8", errors="replace") as file:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record["time"] or 0)))
                file.write(f"{when}  {describe(record)}\n")
        for sink in self._sinks:
            sink.write(record)


def open_run_log(
    directory: Path | str,
    spec: LoggingSpec,
    *,
    total_steps: int,
    continue_at: int | None = None,
    loggers: Mapping[str, Any] | None = None,
    sinks: Mapping[str, SinkOpener] | None = None,
) -> FileLog:
    """The log of a run directory that exists.

    To resume, pass what the checkpoint recorded: its offset as `continue_at` (0 where there was no checkpoint yet), and
    its `loggers`. `sinks` adds views to those of the spec.
    """
    directory, loggers = Path(directory), dict(loggers or {})
    if spec.wandb != "off":
        loggers["wandb"] = identity(directory, loggers.get("wandb", {}))
    views = _sinks_of(directory, spec, total_steps, continue_at) | dict(sinks or {})
    return FileLog(directory, views, continue_at=continue_at, loggers=loggers)


def _last_step(metrics_path: Path) -> int:
    last_line = metrics_path.read_bytes().splitlines()[-1:]
    with suppress(ValueError):
        return int(decode_record(last_line[0])["step"] or 0) if last_line else 0
    return 0


def _next_step(metrics: Path, continue_at: int | None) -> int:
    """The step after the last one that a resumed log keeps: a viewer must forget what came after it."""
    if not continue_at:
        return 0
    last = metrics.read_bytes()[:continue_at].splitlines()[-1]
    return 1 + int(decode_record(last)["step"] or 0)


def _sinks_of(directory: Path, spec: LoggingSpec, total_steps: int, continue_at: int | None) -> dict[str, SinkOpener]:
    metrics = directory / METRICS_FILE
    sinks: dict[str, SinkOpener] = {"samples": lambda: SamplesSink(metrics, directory / SAMPLES_FILE)}
    if spec.console != "off":
        sinks["console"] = console_sink(spec.console, total_steps)
    if spec.csv:
        sinks["csv"] = lambda: CsvSink(metrics, directory / CSV_FILE)
    if spec.tensorboard:
        first_step = _next_step(metrics, continue_at)
        sinks["tensorboard"] = lambda: TensorboardSink(directory / TENSORBOARD_DIRECTORY, first_step)
    if spec.plots:
        sinks["plots"] = lambda: PlotSink(metrics, directory / PLOTS_DIRECTORY)
    if spec.wandb != "off":
        sinks["wandb"] = lambda: WandbSink(directory, spec)
    return sinks
