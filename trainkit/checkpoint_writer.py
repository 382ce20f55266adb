"""Checkpoints in the background: the loop hands over a copy of its state and goes on.

One state is in flight at a time: a second `save` waits until the first is on the disk, so that beside the state itself
at most two copies exist (one being written, or waiting for a disk that is full, and the one just taken). What cannot be
written is tried again, later and later, until it works or a newer state takes its place; the run learns of it by a
message. The end of the run waits for everything, the copies on another machine (`trainkit.remote`) included.
"""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from profiling import nvtx
from trainkit.checkpoints import CheckpointStore, Snapshot, copy_to_host, save_checkpoint
from trainkit.errors import UserError
from trainkit.remote import Mirror, open_remote

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds before a failed save is tried again: doubled each time, up to the second."""
LAST_ATTEMPTS = 6
"""How often to try when the run is ending and only this state is left to write; the pauses double here, too."""


class CheckpointWriter:
    """Saves snapshots into a store, in order, on a thread of its own. Use it as a context manager, on one rank."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._handed_over: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._is_free = threading.Event()
        self._is_free.set()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lost: str | None = None
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None
        spec = store.spec
        self._mirror = Mirror(open_remote(spec.remote), store.root, spec) if spec.remote else None
        self.newest: Path | None = None
        """The newest checkpoint that this writer has written."""

    def save(self, snapshot: Snapshot) -> None:
        """Copy the state and return; waits first while an earlier one is being written."""
        self.wait()
        copy = copy_to_host(snapshot)
        self._is_free.clear()
        if self._thread is None:
            # A daemon: whoever leaves at once does not wait for a disk that hangs.
            self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
            self._thread.start()
        self._handed_over.put(copy)

    def wait(self) -> None:
        """Until nothing is being written. A state that waits for its next attempt does not count."""
        self._is_free.wait()
        if self._bug is not None:
            raise self._bug

    def messages(self) -> list[str]:
        """What there is to tell since the last call."""
        own = [self._messages.get() for _ in range(self._messages.qsize())]
        return own + (self._mirror.messages() if self._mirror else [])

    def close(self) -> None:
        """Write what is left. Raises `UserError` when that fails again and again."""
        if self._thread is not None:
            self._handed_over.put(None)
            self._thread.join()
            self._thread = None
        if self._mirror is not None:
            self._mirror.close()
        if self._bug is not None:
            raise self._bug
        if self._lost is not None:
            raise UserError(self._lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as problem:
            if error is None:
                raise
            error.add_note(str(problem))  # the run already ends for another reason

    def _run(self) -> None:
        try:
            # No variable here: between two saves no copy of the state stays in memory.
            while self._write(self._handed_over.get()):
                pass
        except BaseException as error:  # no full disk but a mistake in the program: the loop raises it
            self._bug = error
        finally:
            self._is_free.set()

    def _write(self, snapshot: Snapshot | None) -> bool:
        """Try until it is written, or a newer one that has come meanwhile; False when nothing more will come."""
        if snapshot is None:
            return False
        pause, problem = FIRST_PAUSE, self._attempt(snapshot)
        while problem:
            step = snapshot.trainer["step"]
            self._messages.put(
                f"{problem}; training goes on, the checkpoint of step {step} is tried again in {pause:.0f} s"
            )
            self._is_free.set()
            try:
                newer = self._handed_over.get(timeout=pause)
            except queue.Empty:
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if newer is None:
                    self._write_last(snapshot)
                    return False
                snapshot, pause = newer, FIRST_PAUSE
            self._is_free.clear()
            problem = self._attempt(snapshot)
            if not problem:
                self._messages.put(f"the checkpoint of step {snapshot.trainer['step']} is saved now")
        self._is_free.set()
        return True

    def _write_last(self, snapshot: Snapshot) -> None:
        """The run is ending, and no newer state will come."""
        for number in range(LAST_ATTEMPTS):
            time.sleep(FIRST_PAUSE * 2**number)
            self._lost = self._attempt(snapshot)
            if self._lost is None:
                return

    def _attempt(self, snapshot: Snapshot) -> str | None:
        """What went wrong; `None` when the checkpoint is there."""
        try:
            with nvtx.range("write"):
                self.newest = save_checkpoint(self._store, snapshot)
            if self._mirror is not None:
                self._mirror.wake(snapshot.trainer["step"])
        except (UserError, OSError) as error:
            return str(error)
        return None
