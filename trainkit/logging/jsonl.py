"""`metrics.jsonl`, the truth that every other view is made of."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from trainkit.artifacts import publish_file
from trainkit.errors import UserError
from trainkit.logging.records import Record, encode_record

METRICS_FILE = "metrics.jsonl"


NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})
"""Troubles of a disk that may pass."""


class MetricsFile:
    """Appends records; each one is with the operating system when `write` returns, so a kill loses none.

    While the disk has no room records wait in memory, in their order, and `trouble` says why. An existing file is
    continued; after a kill, call `continue_at` before the first `write`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another run.dir") from error
        self._written = os.fstat(self._descriptor).st_size
        self._waiting = b""
        self.trouble = ""
        """Why records are waiting for the disk; empty when none is."""

    @property
    def offset(self) -> int:
        """Bytes of all records so far: where the next one starts."""
        return self._written + len(self._waiting)

    def write(self, record: Record) -> None:
        self._waiting += encode_record(record)
        self._append_waiting()

    def _append_waiting(self) -> None:
        try:
            # A full disk may take a part of a line: take it back, so that the file ends with a whole record.
            if os.write(self._descriptor, self._waiting) < len(self._waiting):
                os.ftruncate(self._descriptor, self._written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise UserError(f"cannot write {self.path}: {error.strerror}; check it, then resume") from error
            self.trouble = error.strerror or str(error)
        else:
            self._written, self._waiting, self.trouble = self.offset, b"", ""

    def sync(self) -> int:
        """Flush to the disk and return the offset: a checkpoint that records it may rely on it, power cut included.

        Unless records are waiting for room: a kill then loses these, and a resumed file continues at its end.
        """
        self._append_waiting()
        os.fsync(self._descriptor)
        return self.offset

    def continue_at(self, offset: int) -> Path | None:
        """Forget what came after `offset`: it moves to the next free `metrics.attempt-K.jsonl`, whose path is returned.

        `None` when nothing came after it. When `offset` is not the end of a whole line here (somebody edited the file,
        or it lost its end), the file continues at the last line's end before it.
        """
        content = self.path.read_bytes()
        cut = content.rfind(b"\n", 0, offset) + 1
        tail = content[cut:]
        kept_in = _keep_tail(self.path, tail) if tail else None
        os.ftruncate(self._descriptor, cut)
        os.fsync(self._descriptor)
        self._written = cut
        return kept_in

    def close(self) -> None:
        """`UserError` if the last records found no room to the end."""
        self._append_waiting()
        os.close(self._descriptor)
        if self.trouble:
            lost = self._waiting.count(b"\n")
            raise UserError(f"cannot write the last {lost} records of {self.path}: {self.trouble}; free some space")


def attempts(path: Path) -> list[Path]:
    """The abandoned ends of a metrics file, oldest first."""
    numbered = {
        int(match[1]): other
        for other in path.parent.iterdir()
        if (match := re.fullmatch(rf"{re.escape(path.stem)}\.attempt-(\d+)\.jsonl", other.name))
    }
    return [numbered[number] for number in sorted(numbered)]


def _keep_tail(path: Path, tail: bytes) -> Path:
    """Publish the tail first; only then may the file be cut. A kill in between finds it kept already the next time."""
    earlier = attempts(path)
    if earlier and earlier[-1].read_bytes() == tail:
        return earlier[-1]
    last = int(earlier[-1].stem.rsplit("-", 1)[1]) if earlier else 0
    target = path.with_name(f"{path.stem}.attempt-{last + 1}.jsonl")
    publish_file(target, tail)
    return target
