"""Signals that ask a run to save and stop.

SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (batch systems send one of them before they take the machine away) only raise a
flag that the loop polls once a step. A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from trainkit.errors import EXIT_INTERRUPTED

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__)
SAME_PRESS_SECONDS = 0.3
"""Launchers pass on a Ctrl-C that the terminal has sent to the whole group already; so soon, it is the same one."""


@dataclass
class Interrupts:
    """What was asked for so far."""

    signal_name: str = ""
    """The first signal that came, for instance `SIGTERM`; empty = none."""

    @property
    def requested(self) -> bool:
        """Whether to save and stop after this step."""
        return bool(self.signal_name)


@contextmanager
def catch_interrupts() -> Generator[Interrupts]:
    """Handle the signals inside the block and put the earlier handlers back after it.

    Outside the main thread, which alone may handle signals, nothing is ever requested.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    last_ctrl_c: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last_ctrl_c
        now = time.monotonic()
        if number == signal.SIGINT and last_ctrl_c is not None:
            if now - last_ctrl_c >= SAME_PRESS_SECONDS:
                # Not an exception: unwinding would wait for whatever hangs. Files are published whole or not at all.
                os._exit(EXIT_INTERRUPTED)
            return
        name = signal.Signals(number).name
        interrupts.signal_name = interrupts.signal_name or name
        if number == signal.SIGINT:
            last_ctrl_c = now
            _say("saving after this step; press Ctrl-C again to leave at once")
        else:
            _say(f"{name}: saving after this step")

    earlier = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in earlier.items():
            # `None` stands for a handler that Python did not set and cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _say(text: str) -> None:
    """To the standard error, past its buffer: a handler may run in the middle of a `print`."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
