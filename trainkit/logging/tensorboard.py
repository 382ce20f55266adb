"""TensorBoard event files: `train/loss`, `eval/val_loss` and so on."""

from __future__ import annotations

from pathlib import Path

from trainkit.logging.records import HEADER, TEXT_KINDS, Record

TENSORBOARD_DIRECTORY = "tensorboard"


class TensorboardSink:
    """Writes below `directory`. The viewer purges what an earlier attempt wrote from `first_step` on."""

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step or None)

    def write(self, record: Record) -> None:
        kind, step, when = record["kind"], record["step"], float(record["time"] or 0)
        if kind in TEXT_KINDS:
            self._writer.add_text(str(kind), str(record.get("text", "")), step, when)
            return
        for name, value in record.items():
            if name not in HEADER and isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", float(value), step, when)

    def close(self) -> None:
        self._writer.close()
