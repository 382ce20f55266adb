"""A second home for checkpoints, behind any fsspec URL: `s3://bucket/run`, `gs://…`, `file:///mnt/…`.

The local directory stays the first: a checkpoint is uploaded when it is whole there, in the background, its manifest
last, so that without a manifest there is nothing. Each round makes the remote side hold what retention keeps of the
local one: what a slow or broken network missed is made up for by the next round. Nothing here stops a run.
"""

from __future__ import annotations

import json
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.artifacts import (
    MANIFEST,
    TEMPORARY_MARK,
    fsync_directory,
    make_directory,
    read_manifest,
    set_damaged_aside,
    verify_directory,
)
from trainkit.checkpoints import checkpoint_step, list_checkpoints
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.retention import steps_to_keep
from trainkit.specs import CheckpointSpec

RETRY_SECONDS = 60.0
LAST_PAUSES = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds between the attempts of a run that is ending."""


@dataclass(frozen=True)
class Remote:
    """A folder of checkpoints on a file system of fsspec."""

    files: Any
    folder: str
    url: str

    def steps(self) -> list[int]:
        """The steps that are whole there, ascending."""
        self.files.invalidate_cache()
        if not self.files.exists(self.folder):
            return []
        names = [str(name).rstrip("/").rsplit("/", 1)[-1] for name in self.files.ls(self.folder, detail=False)]
        steps = [int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit()]
        return sorted(step for step in steps if self.files.exists(f"{self.path(step)}/{MANIFEST}"))

    def path(self, step: int) -> str:
        return f"{self.folder}/step-{step:08d}"


def open_remote(url: str) -> Remote:
    """Raises `UserError` when the URL's protocol is unknown or its package is not installed."""
    import fsspec

    try:
        files, folder = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f'checkpoint.remote = "{url}" cannot be opened: {error}; install that package, or choose another URL',
            EXIT_USAGE,
        ) from error
    return Remote(files, folder.rstrip("/"), url.rstrip("/"))


def upload(remote: Remote, local: Path) -> None:
    """Copy a checkpoint: its files, then, when their sizes are right there, its manifest."""
    target = remote.path(checkpoint_step(local))
    manifest = read_manifest(local)
    _delete(remote, target)
    for name, facts in manifest["files"].items():
        remote.files.makedirs(f"{target}/{name}".rsplit("/", 1)[0], exist_ok=True)
        remote.files.put_file(str(local / name), f"{target}/{name}")
        if remote.files.size(f"{target}/{name}") != facts["bytes"]:
            raise OSError(f"{target}/{name} has not arrived whole")
    content = (local / MANIFEST).read_bytes()
    remote.files.pipe_file(f"{target}/{MANIFEST}", content)
    if remote.files.cat_file(f"{target}/{MANIFEST}") != content:
        raise OSError(f"{target}/{MANIFEST} has not arrived whole")


def mirror(remote: Remote, root: Path, spec: CheckpointSpec, fresh: Collection[int] = ()) -> list[int]:
    """Upload what is missing there or was saved anew (`fresh`), newest first, then prune; returns the steps uploaded.

    What local retention deletes in the middle of its upload is left out.
    """
    done: list[int] = []
    remote.files.invalidate_cache()
    for path in reversed(list_checkpoints(root)):
        step = checkpoint_step(path)
        try:
            if step in fresh or not _is_there(remote, path):
                upload(remote, path)
                done.append(step)
        except (OSError, UserError):
            if (path / MANIFEST).exists():
                raise
    _prune(remote, root, spec)
    return done


def _is_there(remote: Remote, local: Path) -> bool:
    """By its manifest, read: a kill may leave half of one where writing a file takes more than an instant."""
    place = f"{remote.path(checkpoint_step(local))}/{MANIFEST}"
    return remote.files.exists(place) and remote.files.cat_file(place) == (local / MANIFEST).read_bytes()


def _prune(remote: Remote, root: Path, spec: CheckpointSpec) -> None:
    there, local = remote.steps(), list_checkpoints(root)
    try:
        trainer = json.loads((local[-1] / "trainer.json").read_text(encoding="utf-8"))
    except (IndexError, FileNotFoundError):  # meanwhile deleted here, because there is a newer one: its turn will come
        return
    newest, best = checkpoint_step(local[-1]), trainer.get("best", {}).get("step")
    kept = steps_to_keep(spec, there, newest=newest, best=best) | {checkpoint_step(path) for path in local}
    for step in set(there) - kept:
        _delete(remote, remote.path(step))


def fetch_newest(remote: Remote, root: Path) -> tuple[Path | None, list[str]]:
    """Download the newest checkpoint that is intact there; also says what was wrong with newer ones."""
    problems: list[str] = []
    for step in reversed(remote.steps()):
        try:
            return _fetch(remote, step, root), problems
        except (OSError, UserError) as error:
            problems.append(f"{remote.url}/step-{step:08d} cannot be used ({error}); trying an older checkpoint")
    return None, problems


def _fetch(remote: Remote, step: int, root: Path) -> Path:
    path = root / f"step-{step:08d}"
    temporary = root / f".{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}"
    make_directory(temporary)
    try:
        (temporary / MANIFEST).write_bytes(remote.files.cat_file(f"{remote.path(step)}/{MANIFEST}"))
        for name in read_manifest(temporary)["files"]:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"its manifest names {name}")
            make_directory((temporary / name).parent)
            remote.files.get_file(f"{remote.path(step)}/{name}", str(temporary / name))
        verify_directory(temporary)
        set_damaged_aside(path)  # whatever stands there was not intact, or nobody would fetch
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_directory(root)
    return path


def _delete(remote: Remote, path: str) -> None:
    """The manifest first: from then on there is no checkpoint."""
    if remote.files.exists(f"{path}/{MANIFEST}"):
        remote.files.rm_file(f"{path}/{MANIFEST}")
    if remote.files.exists(path):
        remote.files.rm(path, recursive=True)


class Mirror:
    """Keeps the remote side up to date from a thread of its own."""

    def __init__(self, remote: Remote, root: Path, spec: CheckpointSpec) -> None:
        self._remote, self._root, self._spec = remote, root, spec
        self._woken, self._is_closing = threading.Event(), False
        self._saved: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._fresh: set[int] = set()
        self._texts: list[str] = []
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def wake(self, step: int) -> None:
        """There is a new checkpoint; what the remote side has of that step, maybe damaged, is not trusted."""
        self._saved.put(step)
        self._woken.set()

    def messages(self) -> list[str]:
        """What there is to tell since the last call."""
        return [self._texts.pop(0) for _ in range(len(self._texts))]

    def close(self) -> None:
        """Bring the remote side up to date once more; gives up, with a message, after a few attempts."""
        self._is_closing = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        is_behind = False
        while not self._is_closing:
            self._woken.wait(RETRY_SECONDS if is_behind else None)
            self._woken.clear()
            if not self._is_closing:
                is_behind = not self._round("it is tried again")
        for pause in LAST_PAUSES:
            if self._round("it is tried again"):
                return
            time.sleep(pause)
        self._round("the local one is whole")

    def _round(self, outlook: str) -> bool:
        self._fresh |= {self._saved.get() for _ in range(self._saved.qsize())}
        try:
            mirror(self._remote, self._root, self._spec, self._fresh)
            self._fresh.clear()
        except Exception as error:  # whatever a file system of somebody else's raises
            self._texts.append(f"cannot upload a checkpoint to {self._remote.url} ({error}); {outlook}")
            return False
        return True
