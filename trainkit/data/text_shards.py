"""Text shards: documents one to a line, written from the files of a source, and what is kept to go on after a kill.

Each file of the source is read by itself into parts. Every so many rows, the same ones in every call, the parts are
flushed and a note says how long they are; the next call cuts them back to that. When all files are read the parts
become the shards, and beside them stands a manifest (`trainkit.artifacts`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trainkit.artifacts import explain_failed_writes, fsync_directory, make_directory, publish_file, seal_directory
from trainkit.data.document_sets import Shard

KIND = "text shards"
ROWS_BETWEEN_NOTES = 10_000
BYTES_BETWEEN_NOTES = 64 << 20
"""Of text; bounds the memory where documents are long."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the shards depend on, besides the content of the source."""

    dataset: str
    config: str
    revision: str
    split: str
    text_field: str
    format: str
    gzip: bool
    val_fraction: float
    seed: int
    max_rows: int
    max_lines: int

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val") if self.val_fraction else ("train",)

    @property
    def suffix(self) -> str:
        return f".{self.format}.gz" if self.gzip else f".{self.format}"

    def split_of(self, file: int, row: int) -> str:
        """Decided by the row's place alone, so that a source that grows at its end keeps the split of its beginning."""
        digest = hashlib.sha256(f"{self.seed}/{file}/{row}".encode()).digest()
        return "val" if int.from_bytes(digest[:8], "little") < self.val_fraction * 2**64 else "train"

    def line(self, text: str) -> bytes:
        """The document as a line, or nothing."""
        if self.format == "jsonl":
            return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        text = re.sub(r"[\r\n]+", " ", text.lstrip("\ufeff\r\n").rstrip("\r\n"))
        return text.encode() + b"\n" if text else b""


@dataclass
class Part:
    """Lines of one split that come from one file of the source, cut into files of `max_lines`."""

    finished: int = 0
    """Files that are full."""
    lines: int = 0
    """In the file that is not full yet; `bytes` likewise."""
    bytes: int = 0


@dataclass
class Progress:
    """How far a file of the source has been read; what its note holds."""

    rows: int = 0
    done: bool = False
    left_out: int = 0
    text_bytes: int = 0
    parts: dict[str, Part] = field(default_factory=dict)


class Work:
    """The unfinished state of an experiment on the disk. Different threads work on different files of the source."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings

    def place(self, file: int) -> Path:
        return self.folder / f"{file:05d}"

    def part(self, file: int, split: str, number: int) -> Path:
        return self.place(file) / f"{split}-{number:05d}{self.settings.suffix}"

    def progress(self, file: int) -> Progress:
        try:
            note: dict[str, Any] = json.loads((self.place(file) / "progress.json").read_text())
        except FileNotFoundError:
            return Progress(parts={split: Part() for split in self.settings.splits})
        parts = {split: Part(**part) for split, part in note.pop("parts").items()}
        return Progress(**note, parts=parts)

    def documents(self, part: Part) -> int:
        return part.finished * self.settings.max_lines + part.lines

    def note(self, file: int, progress: Progress) -> None:
        fsync_directory(self.place(file))
        publish_file(self.place(file) / "progress.json", json.dumps(asdict(progress)))

    def forget(self, file: int) -> None:
        (self.place(file) / "progress.json").unlink()  # first: without it nothing else counts
        shutil.rmtree(self.place(file))

    def append(self, file: int, split: str, part: Part, lines: Sequence[bytes]) -> None:
        """Add lines to the files of a part; durable when this returns."""
        while lines:
            fitting, lines = (
                lines[: self.settings.max_lines - part.lines],
                lines[self.settings.max_lines - part.lines :],
            )
            data = b"".join(fitting)
            if self.settings.gzip:  # a member of its own: members in a row are a valid file
                data = gzip.compress(data, compresslevel=6, mtime=0)
            path = self.part(file, split, part.finished)
            with explain_failed_writes(path), path.open("r+b" if part.bytes else "wb") as stream:
                stream.truncate(part.bytes)  # what was written after the last note, before a kill
                stream.seek(part.bytes)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            part.lines += len(fitting)
            part.bytes += len(data)
            if part.lines == self.settings.max_lines:
                part.finished, part.lines, part.bytes = part.finished + 1, 0, 0


def shard_file(work: Work, file: int, source: Shard, *, limit: int | None, count: Callable[[int], None]) -> int:
    """Read one file of the source, or its first `limit` rows, into parts; the number of rows in them."""
    make_directory(work.place(file))
    progress = work.progress(file)
    if limit is not None and progress.rows > limit:
        work.forget(file)
        make_directory(work.place(file))
        progress = work.progress(file)
    count(progress.rows)
    if progress.done or progress.rows == limit:
        return progress.rows
    texts = islice(source.read(progress.rows), None if limit is None else limit - progress.rows)
    while not progress.done:
        before = progress.rows
        is_end = read_some(work, file, texts, progress)
        # What was read up to a limit is not done: how many rows the whole file has is not known.
        progress.done = is_end and progress.rows != limit
        work.note(file, progress)
        count(progress.rows - before)
        if is_end:
            break
    return progress.rows


def read_some(work: Work, file: int, texts: Iterator[str], progress: Progress) -> bool:
    """Append rows until the next note is due or there are none; whether there are none."""
    settings = work.settings
    lines: dict[str, list[bytes]] = {split: [] for split in settings.splits}
    size, last = 0, progress.rows + ROWS_BETWEEN_NOTES
    while progress.rows < last and size < BYTES_BETWEEN_NOTES and (text := next(texts, None)) is not None:
        line = settings.line(text)
        if line:
            lines[settings.split_of(file, progress.rows)].append(line)
        size += len(line)
        progress.rows += 1
        progress.left_out += not line
        progress.text_bytes += len(text.encode())
    for split, part in progress.parts.items():
        work.append(file, split, part, lines[split])
    return progress.rows < last and size < BYTES_BETWEEN_NOTES


def totals(work: Work, files: Sequence[int]) -> dict[str, int]:
    progress = [work.progress(file) for file in files]
    return {
        "rows": sum(file.rows for file in progress),
        "rows_without_text": sum(file.left_out for file in progress),
        "text_bytes": sum(file.text_bytes for file in progress),
    }


def assemble(work: Work, files: Sequence[int], root: Path, experiment: str, facts: dict[str, Any]) -> None:
    """Give the parts their final names and publish the splits. A call that was killed in here is continued, too."""
    progress = {file: work.progress(file) for file in files}
    for split in work.settings.splits:
        target = root / split / experiment
        if target.exists():
            continue
        staging = work.folder / split
        make_directory(staging)
        number = 0
        for file in files:
            part = progress[file].parts[split]
            for index in range(part.finished + bool(part.lines)):
                source, place = work.part(file, split, index), staging / f"shard-{number:05d}{work.settings.suffix}"
                number += 1
                if not place.exists():  # else it was moved before a kill
                    with explain_failed_writes(place):
                        source.rename(place)
        documents = sum(work.documents(progress[file].parts[split]) for file in files)
        make_directory(target.parent)
        with explain_failed_writes(target):
            seal_directory(staging, extra={"kind": KIND, **facts, "split": split, "documents": documents})
            staging.rename(target)
            fsync_directory(target.parent)
