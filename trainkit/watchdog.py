"""Ends a rank that hangs: with the stacks of its threads, the name of what it was doing, and an exit code of its own.

A rank that died or sleeps leaves the others waiting for it in a collective operation, for ever or for many minutes, on
machines that cost money. Each rank watches only itself: the loop says which phase begins (two attribute writes), and a
thread looks now and then whether that was too long ago. Since all ranks wait for the one that hangs, all of them end.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from trainkit.errors import EXIT_WATCHDOG

PATIENCE = {"start": 10.0, "first step": 10.0, "evaluate": 10.0, "sample": 10.0, "finish": 10.0}
"""How many times the limit a phase may take: the first ones compile, some are long by nature; all others once.

A rank that waits in `step` for another that is still in `data` or `save` must not lose patience before that one."""
GRACE = 5.0
"""Seconds (at most the limit) that a rank which gives up waits before it ends: the others hang for the same reason, and
its end would break their connections before they have shown their stacks."""


class Watchdog:
    """Watches the phases of one rank; `seconds = 0` watches nothing.

    `alarmed` is told what happened before the process ends (it gets two seconds), for instance to record a status.
    """

    def __init__(self, seconds: float = 0.0, *, rank: int = 0, alarmed: Callable[[str], None] | None = None) -> None:
        self._seconds = seconds
        self._rank = rank
        self._alarmed = alarmed
        self._phase, self._step, self._since = "start", 0, time.monotonic()

    def enter(self, phase: str, step: int) -> None:
        """The loop begins `phase` (`data`, `step`, `evaluate`, `sample`, `save` …) after `step` finished steps."""
        self._phase, self._step, self._since = phase, step, time.monotonic()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch while the block runs; the phase `start` begins with it."""
        if not self._seconds:
            yield
            return
        self.enter("start", 0)
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, ended: threading.Event) -> None:
        interval = min(1.0, self._seconds / 10)
        woke = time.monotonic()
        while not ended.wait(interval):
            now = time.monotonic()
            if now - woke > 5 * interval:
                self._since = now  # this process was stopped (Ctrl-Z, a debugger), and begins again
            woke = now
            limit = self._seconds * PATIENCE.get(self._phase, 1)
            if now - self._since > limit:
                self._end(f"{now - self._since:.0f} s")

    def _end(self, duration: str) -> None:
        text = (
            f"watchdog: rank {self._rank} has been in the phase '{self._phase}' of step {self._step} for {duration}; "
            "a rank hangs or died. Continue with --resume, or allow more with distributed.watchdog_seconds"
        )
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self._alarmed is not None:
            # A thread of its own: it may hang as well, on the same disk.
            telling = threading.Thread(target=self._alarmed, args=(text,), daemon=True)
            telling.start()
            telling.join(2.0)
        time.sleep(min(GRACE, self._seconds))
        os._exit(EXIT_WATCHDOG)
