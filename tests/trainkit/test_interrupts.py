"""Real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainkit import interrupts as interrupts_module
from trainkit.errors import EXIT_INTERRUPTED
from trainkit.interrupts import SAME_PRESS_SECONDS, SIGNALS, catch_interrupts

PROGRAM = """
import sys, time
from trainkit.interrupts import catch_interrupts
with catch_interrupts() as interrupts:
    print("ready", flush=True)
    while not interrupts.requested:
        time.sleep(0.01)
    print(interrupts.signal_name, flush=True)
    if sys.argv[1] == "hang":
        try:
            while True: time.sleep(0.01)
        finally:
            print("unwound", flush=True)
print("saved", flush=True)
"""


def start(mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_save_and_stop(number: signal.Signals) -> None:
    with start("stop") as process:
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (0, f"{number.name}\nsaved\n")
    assert "saving after this step" in err
    assert ("press Ctrl-C again to leave at once" in err) == (number == signal.SIGINT)


def test_a_second_ctrl_c_leaves_at_once() -> None:
    with start("hang") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "SIGINT\n"
        time.sleep(SAME_PRESS_SECONDS * 1.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert (process.returncode, out) == (EXIT_INTERRUPTED, "")


def test_one_press_that_arrives_twice_is_one_press(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on the Ctrl-C that the terminal sent to everybody."""
    monkeypatch.setattr(interrupts_module, "SAME_PRESS_SECONDS", 600.0)  # a second press would end the tests
    with catch_interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.signal_name == "SIGINT"


def test_a_batch_system_may_ask_more_than_once() -> None:
    with catch_interrupts() as interrupts:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interrupts.signal_name == "SIGUSR1"


def test_earlier_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), catch_interrupts() as interrupts:
        assert not interrupts.requested
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_are_left_in_peace() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[bool] = []

    def work() -> None:
        with catch_interrupts() as interrupts:
            seen.append(interrupts.requested)
            seen.append([signal.getsignal(number) for number in SIGNALS] == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]
