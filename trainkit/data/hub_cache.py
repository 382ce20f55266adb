"""Texts of hub data sets on the disk: one Arrow file for each data file, which gives any row at once from a memory map.

A file appears when it is complete (temporary name, flush, rename); processes that want the same file wait for one that
fetches it.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

from trainkit.artifacts import explain_failed_writes, make_directory, publish_file, publishing
from trainkit.errors import UserError

_BATCH_ROWS = 256
"""Rows in a batch of a file; fixed, so that the batch of a row is known without looking."""


def cache_root(cache_dir: str) -> Path:
    """`cache_dir`, else `HF_DATASETS_CACHE`, else the `datasets` folder below `HF_HOME`."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return Path(cache_dir or os.environ.get("HF_DATASETS_CACHE") or Path(home, "datasets")).expanduser()


def is_cache_named(cache_dir: str) -> bool:
    return bool(cache_dir or os.environ.get("HF_DATASETS_CACHE"))


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` has written, or None."""
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and run once with the network") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    make_directory(path.parent)
    publish_file(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


class CachedTexts:
    """A complete file, mapped into memory. Threads may share it. A batch is checked when it is first read."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._path = path
        self._lock = threading.Lock()
        with _explain_damage(path):
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._checked = bytearray(self._file.num_record_batches)
        batches = len(self._checked)
        self._rows = max(batches - 1, 0) * _BATCH_ROWS + (len(self._texts(batches - 1)) if batches else 0)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> str:
        return cast(str, self._texts(row // _BATCH_ROWS)[row % _BATCH_ROWS].as_py())

    def read(self, start: int) -> Iterator[str]:
        for first in range(start - start % _BATCH_ROWS, self._rows, _BATCH_ROWS):
            yield from self._texts(first // _BATCH_ROWS)[max(start - first, 0) :].to_pylist()

    def _texts(self, number: int) -> Any:
        """One batch, an Arrow array of strings."""
        with self._lock, _explain_damage(self._path):
            batch = self._file.get_batch(number)
            if not self._checked[number]:
                batch.validate(full=True)  # else a wrong offset reads outside of the file
                if batch.column(0).null_count or len(batch) > _BATCH_ROWS:
                    raise ValueError(f"batch {number}")
                self._checked[number] = 1
        return batch.column(0)


@contextmanager
def _explain_damage(path: Path) -> Generator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({message}); remove it and run once with the network") from error


def keep(path: Path, read: Callable[[], Iterator[str]]) -> None:
    """Make sure that `path` exists, from what `read()` gives."""
    if path.exists():
        return
    make_directory(path.parent)
    with _only_one(path):
        if not path.exists():  # another process may have made it while this one waited
            _write(path, read())


def _write(path: Path, texts: Iterator[str]) -> None:
    import pyarrow as pa

    schema = pa.schema([("text", pa.large_string())])
    with publishing(path, is_locked=True) as file, pa.ipc.new_file(file, schema) as writer:
        while batch := list(islice(texts, _BATCH_ROWS)):
            writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))


@contextmanager
def _only_one(path: Path) -> Generator[None]:
    # Beside the file, and never removed: a lock that is unlinked while another process waits for it locks nothing.
    lock = path.with_name(f".{path.name}.lock")
    with explain_failed_writes(lock):
        file = lock.open("ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
