"""Sinks are views of the records, and a view never stops or slows the run.

Each sink lives on a daemon thread of its own, behind a bounded queue: it is opened there (opening may hang too), a
full queue gives up its oldest record (the newest says most) and counts it, and the first exception switches the sink
off. Problems are collected for the run to report; they are never raised.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeAlias

from trainkit.logging.records import Record

QUEUE_SIZE = 1024


class Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


SinkOpener: TypeAlias = Callable[[], Sink]


class BackgroundSink:
    """Runs the sink that `open_sink` returns, away from the run's thread."""

    def __init__(self, name: str, open_sink: SinkOpener, *, queue_size: int = QUEUE_SIZE) -> None:
        self.name = name
        self.dropped = 0
        """Records that the sink was too slow for."""
        # Not `queue.Queue`: the run would wait for its lock while the sink's thread, which holds it, waits for the
        # interpreter; one millisecond a record.
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._queue_size = queue_size
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(open_sink,), name=f"sink-{name}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Hand over a record, without waiting."""
        if not self._thread.is_alive():  # it failed, and that is reported
            return
        self._put(record)

    def problems(self) -> list[str]:
        """What went wrong since the last call."""
        return [self._problems.get() for _ in range(self._problems.qsize())]

    def ask_to_close(self) -> None:
        """Let the sink finish what it has; `wait_closed` waits for it."""
        self._put(None)

    def wait_closed(self, deadline: float) -> None:
        """Wait until `time.monotonic()` reaches `deadline` at most; a sink that hangs is left behind."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._problems.put(f"the {self.name} sink did not finish in time and is left behind")
        if self.dropped:
            self._problems.put(f"the {self.name} sink was too slow and missed {self.dropped:,} records")

    def _put(self, item: Record | None) -> None:
        if self._queue.qsize() >= self._queue_size:
            with suppress(queue.Empty):
                self._queue.get_nowait()
                self.dropped += 1
        self._queue.put(item)

    def _run(self, open_sink: SinkOpener) -> None:
        try:
            sink = open_sink()
            while (record := self._queue.get()) is not None:
                sink.write(record)
            sink.close()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self._problems.put(f"the {self.name} sink failed and is switched off ({reason})")
