"""Draws `plots/*.png` while the run goes on."""

from __future__ import annotations

import time
from pathlib import Path

from trainkit.logging.records import Record

PLOTS_DIRECTORY = "plots"
SHARE_OF_TIME = 0.02
"""Drawing competes with the run for the interpreter; it takes this share of the time at most, and once at the end."""


class PlotSink:
    """Draws after validations, and at the end."""

    def __init__(self, metrics_path: Path, directory: Path) -> None:
        self._metrics_path = metrics_path
        self._directory = directory
        self._not_before = 0.0

    def write(self, record: Record) -> None:
        if record["kind"] == "eval" and time.monotonic() >= self._not_before:
            self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        from trainkit.plots import draw_plots  # matplotlib takes a second to import

        start = time.monotonic()
        draw_plots(self._metrics_path, self._directory)
        end = time.monotonic()
        self._not_before = end + (end - start) / SHARE_OF_TIME
