"""Start the ranks of a run on this machine, as `torchrun` would, and end with them.

Each rank is a process of its own with torchrun's environment variables, so that nothing below knows who started it.
Signals are passed on. When a rank fails the others cannot go on: they get a moment to say what they saw, and are ended.
When this process dies, however it does, the ranks notice and leave.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, TypeVar

import torch

from trainkit.distribution import choose_device
from trainkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED, UserError
from trainkit.interrupts import SIGNALS
from trainkit.specs import DistributedSpec

T = TypeVar("T")

LAST_WORDS_SECONDS = 10.0
"""How long the other ranks may go on when one has failed: to notice, to write why, to record a status."""


def processes_to_start(distributed: DistributedSpec, device: str) -> int:
    """How many ranks this process must start; 1 = it is one itself, alone or of those that somebody started."""
    if "RANK" in os.environ:
        return 1
    if distributed.processes != "auto":
        return distributed.processes
    names_one = ":" in device
    on_cuda = choose_device(device, local_rank=0).type == "cuda"
    return torch.cuda.device_count() if on_cuda and not names_one else 1


def launch(processes: int, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call `function` on each of so many ranks and return what the first one returned.

    Function, arguments and result must pickle. A `UserError` of a rank is raised here; a rank that ends otherwise than
    by returning is a `UserError` with its exit code (1, where a signal ended it), or `KeyboardInterrupt`.
    """
    context = multiprocessing.get_context("spawn")
    shared = _environment(processes)
    ranks: list[_Rank] = []
    with _passing_on_signals(ranks):
        try:
            for number in range(processes):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank, args=(theirs, function, arguments, named), name=f"rank-{number}"
                )
                with _variables({**shared, "RANK": str(number), "LOCAL_RANK": str(number)}):
                    process.start()
                theirs.close()
                ranks.append(_Rank(number, process, ours))
            _wait_for(ranks)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
    return _result(ranks)


@dataclass
class _Rank:
    number: int
    process: SpawnProcess
    pipe: Connection
    said: Any = None
    """`(True, result)`, `(False, message, exit code)`, or None: it ended without a word."""
    exit_code: int | None = None
    """Once it has ended by itself; negative = the signal that ended it."""

    def listen(self) -> None:
        try:
            while self.said is None and self.pipe.poll():
                self.said = self.pipe.recv()
        except EOFError:
            pass


def _run_rank(
    pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """The whole life of a rank."""
    threading.Thread(target=_leave_with_parent, name="launcher watch", daemon=True).start()
    try:
        result = function(*arguments, **named)
    except UserError as error:
        pipe.send((False, str(error), error.exit_code))
        raise SystemExit(error.exit_code) from None
    pipe.send((True, result if os.environ["RANK"] == "0" else None))


def _leave_with_parent() -> None:
    """Files are published whole or not at all, so that leaving at once does no harm."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(EXIT_FAILURE)


def _wait_for(ranks: list[_Rank]) -> None:
    """Until all have ended, or for a moment after the first that failed."""
    deadline: float | None = None
    running = list(ranks)
    while running:
        patience = None if deadline is None else deadline - time.monotonic()
        if patience is not None and patience <= 0:
            return
        pipes = [rank.pipe for rank in running if rank.said is None and not rank.pipe.closed]
        wait([*(rank.process.sentinel for rank in running), *pipes], patience)
        for rank in list(running):
            rank.listen()
            rank.exit_code = rank.process.exitcode
            if rank.exit_code is not None:
                running.remove(rank)
            if rank.exit_code and deadline is None:
                deadline = time.monotonic() + LAST_WORDS_SECONDS


def _result(ranks: list[_Rank]) -> Any:
    refusals = [rank.said[1:] for rank in ranks if rank.said is not None and not rank.said[0]]
    if refusals:
        raise UserError(*refusals[0])
    failed = [rank for rank in ranks if rank.exit_code]
    if failed:
        raise _failure(_cause(failed), len(ranks))
    return ranks[0].said[1]


def _cause(failed: list[_Rank]) -> _Rank:
    """The rank that ended the others: by a signal, or with a code that means something (of the watchdog, of Ctrl-C).

    A plain failure is often only that another rank does not answer.
    """
    return min(failed, key=lambda rank: (rank.exit_code == EXIT_FAILURE, rank.exit_code or 0))


def _failure(rank: _Rank, size: int) -> BaseException:
    code = rank.exit_code or EXIT_FAILURE
    if code == EXIT_INTERRUPTED:
        return KeyboardInterrupt()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return UserError(
        f"rank {rank.number} of {size} {how}, and the others with it; what it wrote stands above; "
        "continue from the newest checkpoint with --resume",
        max(code, EXIT_FAILURE),
    )


@contextmanager
def _passing_on_signals(ranks: list[_Rank]) -> Generator[None]:
    """The first Ctrl-C of a terminal reaches the ranks twice, which they take for one (`trainkit.interrupts`)."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.process.is_alive() and rank.process.pid is not None:
                os.kill(rank.process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _environment(processes: int) -> dict[str, str]:
    """What torchrun sets for all ranks of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        # Each rank would take all cores, and all would wait for each other.
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return shared


@contextmanager
def _variables(values: Mapping[str, str]) -> Generator[None]:
    """Environment variables for what starts inside: libraries read them while they are imported."""
    earlier = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
