"""`metrics.csv`: the metrics of `metrics.jsonl` as one table, a column for each name that ever occurs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainkit.artifacts import publish_file
from trainkit.logging.follow import Follower
from trainkit.logging.records import HEADER, TEXT_KINDS, Record

CSV_FILE = "metrics.csv"


class CsvSink:
    """Appends the rows that `metrics_path` gained; makes the whole table anew when opened and when a column appears."""

    def __init__(self, metrics_path: Path, csv_path: Path) -> None:
        self._metrics_path = metrics_path
        self._csv_path = csv_path
        self._make_anew()

    def write(self, record: Record) -> None:
        del record  # only the sign that the file has grown
        rows = _with_metrics(self._follower.new_records())
        if _columns(rows, self._columns) != self._columns:
            self._make_anew()
        elif rows:
            with self._csv_path.open("a", encoding="utf-8", newline="") as file:
                file.write(_table(rows, self._columns))

    def close(self) -> None:
        self._make_anew()  # whatever this view missed, or somebody changed

    def _make_anew(self) -> None:
        self._follower = Follower(self._metrics_path)
        rows = _with_metrics(self._follower.new_records())
        self._columns = _columns(rows, HEADER)
        publish_file(self._csv_path, ",".join(self._columns) + "\n" + _table(rows, self._columns))


def _with_metrics(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["kind"] not in TEXT_KINDS]


def _columns(rows: Iterable[Record], known: Sequence[str]) -> list[str]:
    """The known columns, then the new ones in the order they appear."""
    return list(dict.fromkeys([*known, *(name for row in rows for name in row)]))


def _table(rows: Iterable[Record], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
