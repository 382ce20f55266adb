"""The process that talks to Weights & Biases: records come in on standard input until it is closed."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from trainkit.logging.records import HEADER, TEXT_KINDS, Record, decode_record


def main() -> None:
    settings = json.loads(sys.argv[1])
    records = _incoming(sys.stdin.buffer, settings["finish_seconds"])
    import wandb  # only now: whatever it waits for, somebody counts the seconds

    run = wandb.init(
        project=settings["project"] or None,
        entity=settings["entity"] or None,
        id=settings["id"],
        name=settings["name"],
        resume="allow",
        mode=settings["mode"],
        dir=settings["directory"],
        config=_config(Path(settings["config"])),
        settings=wandb.Settings(console="off", x_disable_stats=True),
    )
    # Steps are a metric like any other, so that a run that goes back to a checkpoint may say a step twice.
    run.define_metric("*", step_metric="step")
    has_ended_well = _send(run, records)
    if has_ended_well and settings["artifacts"]:
        newest = Path(settings["directory"]) / "checkpoints" / "latest"
        if newest.exists():
            artifact = wandb.Artifact(f"{settings['name']}-checkpoint", type="model")
            artifact.add_dir(str(newest.resolve()))
            run.log_artifact(artifact)
    run.finish(exit_code=0 if has_ended_well else 1)


def _incoming(stream: IO[bytes], finish_seconds: float) -> Iterator[Record]:
    """The records of `stream`; once it has ended this process lives for `finish_seconds` at most."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(b"")
        limit = threading.Timer(finish_seconds, os._exit, (1,))
        limit.daemon = True
        limit.start()

    threading.Thread(target=read, daemon=True).start()
    return map(decode_record, iter(lines.get, b""))


def _send(run: Any, records: Iterable[Record]) -> bool:
    """Log them all; whether the last one said that this is the end."""
    for record in records:
        if record["kind"] == "close":
            return True
        if record["kind"] in TEXT_KINDS:
            continue
        numbers = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in HEADER and isinstance(value, int | float)
        }
        run.log({"step": record["step"], **numbers})
    return False


def _config(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    main()
