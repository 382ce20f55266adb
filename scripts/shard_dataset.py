"""Turn a data set of the hub, or local files, into shards of text with one document on each line.

    uv run python scripts/shard_dataset.py --dataset HuggingFaceFW/fineweb --config sample-10BT \
        --experiment fineweb-10bt --root /workspace/datasets --gzip

writes `ROOT/train/EXPERIMENT/shard-00000.lines.gz`, …, `ROOT/val/EXPERIMENT/…` and beside them a `manifest.json` with
the SHA-256 of each file. A call that was stopped, even killed, is continued by the same call: the files are the same to
the byte as if nothing had happened, whatever the number of workers.

A line holds no line break, so in a document each run of them becomes one space (and goes at its ends), as does a byte
order mark at its start; a document without any text is left out. `--format jsonl` keeps every text as it is.

What is unfinished lies below `ROOT/.EXPERIMENT.unfinished` (`trainkit.data.text_shards`).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli.common import counted
from cli.text_sources import is_local
from trainkit.artifacts import is_sealed, make_directory, publish_file, read_manifest
from trainkit.data.document_sets import Shard, ShardedDocuments
from trainkit.data.documents import open_local_documents
from trainkit.data.hub import open_hub_documents, resolve_revision
from trainkit.data.hub_files import Network
from trainkit.data.text_shards import KIND, Settings, Work, assemble, shard_file, totals
from trainkit.errors import EXIT_INTERRUPTED, UserError

SECONDS_BETWEEN_LINES = 10.0


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
        say(f"{target}: {counted(manifest['documents'], 'document')} in {counted(len(manifest['files']), 'file')}")


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


def made_with(target: Path) -> dict[str, Any]:
    if not is_sealed(target, kind=KIND):
        raise UserError(f"{target} is not a folder of shards that this command wrote; choose another --experiment")
    return read_manifest(target)["settings"]


def require_equal(place: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"{place} was made {typed(key, before.get(key))}, not {typed(key, value)}; "
                "choose another --experiment or remove it"
            )


def typed(key: str, value: Any) -> str:
    """A setting as it stands on a command line."""
    flag = f"--{key.replace('_', '-')}"
    if value is None or value is False or value == "":
        return f"without {flag}"
    return f"with {flag}" if value is True else f"with {flag} {shlex.quote(str(value))}"


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
