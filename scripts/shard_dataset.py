"""Turn a data set of the hub, or local files, into shards of text with one document on each line.

    uv run python scripts/shard_dataset.py --dataset HuggingFaceFW/fineweb --config sample-10BT \
        --experiment fineweb-10bt --root /workspace/datasets --gzip

writes `ROOT/train/EXPERIMENT/shard-00000.lines.gz`, …, `ROOT/val/EXPERIMENT/…` and beside them a `manifest.json` with
the SHA-256 of each file. A call that was stopped, even killed, is continued by the same call: the files are the same to
the byte as if nothing had happened, whatever the number of workers.

A line holds no line break, so in a document each run of them becomes one space (and goes at its ends), as does a byte
order mark at its start; a document without any text is left out. `--format jsonl` keeps every text as it is.

How it goes on after a kill: each file of the source is read by itself into parts below `ROOT/.EXPERIMENT.unfinished`.
Every so many rows, the same ones in every call, the parts are flushed and a note says how long they are; the next call
cuts them back to that. When all files are read the parts become the shards.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trainkit.artifacts import (
    explain_failed_writes,
    fsync_directory,
    is_sealed,
    make_directory,
    publish_file,
    read_manifest,
    seal_directory,
)
from trainkit.data.document_sets import Shard, ShardedDocuments
from trainkit.data.documents import SUFFIXES, open_local_documents
from trainkit.data.hub import open_hub_documents, resolve_revision
from trainkit.data.hub_files import Network
from trainkit.errors import EXIT_INTERRUPTED, UserError

KIND = "text shards"
ROWS_BETWEEN_NOTES = 10_000
BYTES_BETWEEN_NOTES = 64 << 20
"""Of text; bounds the memory where documents are long."""
SECONDS_BETWEEN_LINES = 10.0


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


def shard_files(work: Work, sources: Sequence[Shard], *, workers: int, say: Callable[[str], None]) -> list[int]:
    """Read the files of the source; the numbers of those that the result is made of."""
    counter = Counter()
    rows = {file: known.rows for file in range(len(sources)) if (known := work.progress(file)).done}
    waiting = iter(range(len(sources)))
    running: dict[Future[int], int] = {}
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sharding")

    def missing(file: int) -> int | None:
        """Rows that `file` is to give, as far as is known before all files in front of it are read; None = all."""
        if not work.settings.max_rows:
            return None
        before = [rows[other] for other in range(file) if other in rows]
        return work.settings.max_rows - sum(before) if len(before) == file else work.settings.max_rows

    def start(file: int, limit: int | None) -> Future[int]:
        return pool.submit(shard_file, work, file, sources[file], limit=limit, count=counter.add)

    while True:
        while len(running) < workers and (file := next(waiting, None)) is not None:
            limit = missing(file)
            if limit is not None and limit <= 0:
                waiting = iter(())
                break
            running[start(file, limit)] = file
        if not running:
            break
        finished, _ = wait(running, timeout=SECONDS_BETWEEN_LINES, return_when=FIRST_COMPLETED)
        for job in finished:
            rows[running.pop(job)] = job.result()
        say(f"{counter.value:,} rows, {len(rows)} of {len(sources)} files")
    used: list[int] = []
    for file in range(len(sources)):
        limit = missing(file)
        if limit is not None and limit <= 0:
            break
        used.append(file)
        if limit is not None and rows[file] > limit:  # it was begun before the rows of those in front were known
            rows[file] = start(file, limit).result()
    pool.shutdown()
    return used


class Counter:
    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.value += count


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


def open_source(settings: Settings, commit: str, network: Network) -> ShardedDocuments:
    if is_local(settings.dataset):
        return open_local_documents(Path(settings.dataset).expanduser(), text_field=settings.text_field)
    documents = open_hub_documents(
        settings.dataset,
        config=settings.config,
        split=settings.split,
        revision=commit,
        text_field=settings.text_field,
        network=network,
    )
    assert isinstance(documents, ShardedDocuments)
    return documents


def is_local(dataset: str) -> bool:
    """Whether it is there, or cannot be the name of a hub data set."""
    if Path(dataset).expanduser().exists():
        return True
    return dataset.endswith(SUFFIXES) or dataset.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)


def shard(settings: Settings, root: Path, experiment: str, *, workers: int, say: Callable[[str], None]) -> None:
    folder = root / f".{experiment}.unfinished"
    targets = [root / split / experiment for split in settings.splits]
    asked = asdict(settings)
    for target in (root / split / experiment for split in ("train", "val")):
        if target.exists():
            require_equal(target, made_with(target), asked)
    if all(target.exists() for target in targets):
        shutil.rmtree(folder, ignore_errors=True)  # what a kill after the last rename left
        say(f"finished already: {', '.join(map(str, targets))}")
        return
    make_directory(folder)
    with only_one(folder):
        work = Work(folder, settings)
        known = begin(work, say)
        files = read_source(work, known, workers=workers, say=say)
        assemble(work, files, root, experiment, {**known, **totals(work, files)})
        shutil.rmtree(folder)
    for target in targets:
        manifest = read_manifest(target)
        say(f"{target}: {manifest['documents']:,} documents in {len(manifest['files'])} files")


def begin(work: Work, say: Callable[[str], None]) -> dict[str, Any]:
    """What the experiment was begun with: its settings, and for the hub the commit that it stays with."""
    settings, note = work.settings, work.folder / "settings.json"
    if note.exists():
        known: dict[str, Any] = json.loads(note.read_text())
        require_equal(work.folder, known["settings"], asdict(settings))
        say("going on where the last call stopped")
        return known
    commit = ""
    if not is_local(settings.dataset):
        commit = resolve_revision(settings.dataset, settings.revision, network=Network(report=say))
    known = {"settings": asdict(settings), "commit": commit}
    known["source"] = open_source(settings, commit, Network(report=say)).identity
    publish_file(note, json.dumps(known, indent=1))
    return known


def read_source(work: Work, known: dict[str, Any], *, workers: int, say: Callable[[str], None]) -> list[int]:
    """Read what is missing; the numbers of the files that the result is made of."""
    note = work.folder / "files.json"  # once it is there parts are renamed, and nothing may be read again
    if note.exists():
        return json.loads(note.read_text())
    source = open_source(work.settings, known["commit"], Network(report=say))
    if source.identity != known["source"]:
        raise UserError(f"{work.settings.dataset} has changed since {work.folder} was begun; remove that to start anew")
    files = shard_files(work, source.shards, workers=workers, say=say)
    if not any(work.documents(part) for file in files for part in work.progress(file).parts.values()):
        raise UserError(f"{work.settings.dataset} holds no document; give it some text")
    publish_file(note, json.dumps(files))
    return files


def totals(work: Work, files: Sequence[int]) -> dict[str, int]:
    progress = [work.progress(file) for file in files]
    return {
        "rows": sum(file.rows for file in progress),
        "rows_without_text": sum(file.left_out for file in progress),
        "text_bytes": sum(file.text_bytes for file in progress),
    }


def made_with(target: Path) -> dict[str, Any]:
    if not is_sealed(target, kind=KIND):
        raise UserError(f"{target} is not a folder of shards that this command wrote; choose another --experiment")
    return read_manifest(target)["settings"]


def require_equal(place: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"{place} was made with --{key.replace('_', '-')} {before.get(key)!r}, not {value!r}; "
                "choose another --experiment or remove it"
            )


@contextmanager
def only_one(folder: Path) -> Generator[None]:
    with (folder / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}; wait for it to end") from None
        yield


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a data set of the hub, or local files, as shards with one document on each line.",
        epilog="Downloads are kept when HF_DATASETS_CACHE is set; HF_HOME and HF_TOKEN are honoured.",
    )
    parser.add_argument("--dataset", required=True, help="name on the hub (HuggingFaceFW/fineweb), or a file or folder")
    parser.add_argument("--config", default="", help="configuration of a hub data set, such as sample-10BT")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub data set; default: the newest")
    parser.add_argument("--split", default="train", help="split of a hub data set (default: %(default)s)")
    parser.add_argument("--text-field", default="text", help="column of the text (default: %(default)s)")
    parser.add_argument("--experiment", required=True, help="name of the folders below ROOT/train and ROOT/val")
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets, such as /workspace/datasets")
    parser.add_argument("--format", choices=("lines", "jsonl"), default="lines", help="jsonl keeps line breaks")
    parser.add_argument("--gzip", action="store_true", help="compress the shards")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of the rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the division into train and val")
    parser.add_argument("--max-rows", type=int, default=0, help="rows to read from the front; 0 = all")
    parser.add_argument("--max-lines", type=int, default=100_000, help="lines in a shard (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="files to read at the same time (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"\w[\w.+-]*", options.experiment):
        parser.error(f"--experiment {options.experiment!r} is no name for a folder: use letters, digits and . + - _")
    if not 0 <= options.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    for name, least in (("max_rows", 0), ("max_lines", 1), ("workers", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.0f} s] {line}", file=sys.stderr, flush=True)

    code = 0
    try:
        shard(settings, options.root, options.experiment, workers=options.workers, say=say)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    # Not sys.exit, which would wait for threads that may be waiting for the network: notes on the disk are always true.
    os._exit(code)


if __name__ == "__main__":
    main()
