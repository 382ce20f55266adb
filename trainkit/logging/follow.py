"""Reading a metrics file while it grows."""

from __future__ import annotations

from pathlib import Path

from trainkit.logging.records import Record, decode_record


class Follower:
    """Yields each record once, in order, however often or seldom it is asked.

    File views are made this way rather than from the records handed to them: the record is only the sign that there is
    something new, so a view that missed some is complete again the next time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_records(self) -> list[Record]:
        """The whole lines since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [decode_record(line) for line in whole.splitlines()]
