"""`samples.md`: what the model made at each step, to read from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from trainkit.artifacts import publish_file
from trainkit.logging.follow import Follower
from trainkit.logging.records import HEADER, Record

SAMPLES_FILE = "samples.md"


class SamplesSink:
    """Appends the samples that `metrics_path` gained; made anew when opened, so that a resume forgets here too."""

    def __init__(self, metrics_path: Path, samples_path: Path) -> None:
        self._samples_path = samples_path
        self._follower = Follower(metrics_path)
        self._step: object = None
        publish_file(samples_path, "# Samples\n" + self._new_text())

    def write(self, record: Record) -> None:
        if record["kind"] == "sample" and (text := self._new_text()):
            with self._samples_path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(text)

    def close(self) -> None:
        pass

    def _new_text(self) -> str:
        return "".join(self._sections(self._follower.new_records()))

    def _sections(self, records: Iterable[Record]) -> Iterable[str]:
        for record in records:
            if record["kind"] != "sample":
                continue
            if record["step"] != self._step:
                self._step = record["step"]
                yield f"\n## Step {self._step:,}\n"
            yield _section(record)


def _section(record: Record) -> str:
    text = str(record.get("text", ""))
    facts = "; ".join(f"{name}: {value}" for name, value in record.items() if name not in (*HEADER, "text"))
    # A fence longer than any run of backticks inside shows the text as it is.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"\n{facts + chr(10) * 2 if facts else ''}{fence}text\n{text}\n{fence}\n"
