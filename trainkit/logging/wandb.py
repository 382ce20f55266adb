"""Weights & Biases, in a process of its own (`trainkit.logging.wandb_process`).

The client installs exit handlers that wait for its server, for ever if need be, and threads that compete with the run.
A process apart can do neither: records go to it through a pipe, and when the run ends it has a limited time to finish.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.artifacts import make_directory, publish_file
from trainkit.logging.records import Record, encode_record
from trainkit.specs import LoggingSpec

WANDB_DIRECTORY = "wandb"
FINISH_SECONDS = 120.0
"""How long the other process may take to finish once the run has ended, whatever its server does."""


class WandbSink:
    """Sends records to a run whose id is kept in `directory`, so that a resumed run continues there."""

    def __init__(self, directory: Path, spec: LoggingSpec, *, finish_seconds: float = FINISH_SECONDS) -> None:
        home = directory / WANDB_DIRECTORY
        make_directory(home)
        self._output = home / "output.txt"
        settings: dict[str, Any] = {
            "mode": spec.wandb,
            "project": spec.wandb_project,
            "entity": spec.wandb_entity,
            "artifacts": spec.wandb_artifacts,
            "id": run_id(home),
            "name": directory.resolve().name,
            "directory": str(directory.resolve()),
            "config": str((directory / "config.json").resolve()),
            "finish_seconds": finish_seconds,
        }
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainkit.logging.wandb_process", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the run, which then says how it ended
            )

    def write(self, record: Record) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode_record(record))
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"its process ended; see {self._output}") from None

    def close(self) -> None:
        self.write({"kind": "close", "step": 0, "time": 0.0})  # without it, the other side knows of a crash
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait() != 0:
            raise RuntimeError(f"its process failed; see {self._output}")


def identity(directory: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """Which run of the service this one is, for a checkpoint.

    `recorded` is what the checkpoint that the run begins with says. It counts where the directory knows no id yet and
    has the same name: that is the same run, on another machine; under another name it would be a second one.
    """
    home, name = directory / WANDB_DIRECTORY, directory.resolve().name
    make_directory(home)
    return {"id": run_id(home, recorded["id"] if recorded.get("run") == name else ""), "run": name}


def run_id(home: Path, known: str = "") -> str:
    """The id in `home`; the first time `known`, or else a new one, is kept there."""
    path = home / "id.txt"
    if not path.exists():
        publish_file(path, (known or secrets.token_hex(4)) + "\n")
    return path.read_text(encoding="ascii").strip()
