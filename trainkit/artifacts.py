"""How every file set of the project comes to exist: whole, or not at all.

A directory is written under a temporary name beside its place, sealed with a manifest (bytes and SHA-256 of each file),
flushed to the disk and renamed. Whoever loads verifies the manifest first: without a valid one the directory does not
exist. Fault injection in tests hooks into `step_hook`, which is called with the name of each stage.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trainkit.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
"""Since 2 a manifest carries a checksum of itself; those of format 1 are still read."""
TEMPORARY_MARK = ".tmp-"
OLD_MARK = ".replaced"


def _no_hook(stage: str) -> None:
    del stage


step_hook: Callable[[str], None] = _no_hook
"""Called with "write", "seal", "fsync", "rename", "between" (of several renames) and "renamed" as a publication passes
these points, and with "snapshot", "verify" and "prune" as a checkpoint does; tests replace it."""


@contextmanager
def publish_directory(
    path: Path | str, *, replace: bool = False, extra: Mapping[str, Any] | None = None
) -> Generator[Path]:
    """Yield a temporary directory; when the block ends well, it becomes `path`, sealed and durable.

    On any exception (Ctrl-C included) nothing is left; an `OSError` becomes a `UserError`. `extra` is stored in the
    manifest. An existing `path` is an error unless `replace` and it is empty or of the same `extra["kind"]`; it then
    stays valid until the instant the new one takes its place.
    """
    path = Path(path)
    if _aside(path).exists():
        _end_replacement(path)
    if path.exists() and not replace:
        raise UserError(f"{path} exists already; remove it or choose another place")
    require_replaceable(path, kind=(extra or {}).get("kind"))
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}")
    make_directory(path.parent)
    make_directory(temporary)
    try:
        with explain_failed_writes(path):
            step_hook("write")
            yield temporary
            seal_directory(temporary, extra=extra)
            step_hook("rename")
            _move_into_place(temporary, path)
            step_hook("renamed")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # unfinished, or what it has replaced


def require_replaceable(path: Path | str, *, kind: str | None) -> None:
    """Refuse a place that holds anything but a sealed directory of this kind: it is not ours to delete."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())) or is_sealed(path, kind=kind):
        return
    raise UserError(f"{path} is not a {kind or 'directory'} that this project wrote; remove it or choose another place")


def is_sealed(path: Path | str, *, kind: str | None) -> bool:
    """Whether `path` has a manifest of this kind; its files may be damaged."""
    try:
        return read_manifest(path).get("kind") == kind
    except UserError:
        return False


def publish_file(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, whatever happens meanwhile."""
    with publishing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def publishing(path: Path | str, *, is_locked: bool = False) -> Generator[BinaryIO]:
    """Yield an open file; when the block ends well, it is flushed to the disk and becomes `path` in one instant.

    On any exception nothing is left; an `OSError` becomes a `UserError`. `is_locked`: the caller lets nobody else write
    `path` meanwhile, so that all attempts share one temporary name and each removes what a killed one left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{'' if is_locked else secrets.token_hex(4)}")
    try:
        with explain_failed_writes(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def explain_failed_writes(path: Path | str) -> Generator[None]:
    """An `OSError` of the block (a full disk, a limit, no permission) becomes one sentence about writing `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another place") from error


def make_directory(path: Path) -> None:
    """Create `path` and its parents, durably, or say in one sentence why not."""
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            fsync_directory(folder.parent)
    except OSError as error:
        raise UserError(f"cannot create the directory {path}: {error.strerror}; choose a writable place") from error


def seal_directory(directory: Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Flush every file below `directory` and write its manifest (also flushed)."""
    step_hook("seal")
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST):
        _fsync_file(file)
        name = file.relative_to(directory).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    manifest = {"format": FORMAT, "files": files, **(extra or {})}
    target = directory / MANIFEST
    target.write_text(_with_checksum(manifest), encoding="utf-8")
    _fsync_file(target)
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        fsync_directory(folder)


def verify_directory(directory: Path | str) -> dict[str, Any]:
    """Check every file against the manifest and return it; a `UserError` names the first file that is not as sealed."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, expected in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"{directory} is damaged: {name} is missing; use another copy")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise UserError(
                f"{directory} is damaged: {name} has {size} bytes, not {expected['bytes']}; use another copy"
            )
        if sha256_file(file) != expected["sha256"]:
            raise UserError(
                f"{directory} is damaged: the content of {name} does not match its SHA-256; use another copy"
            )
    return manifest


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """The manifest of a sealed directory, its shape checked but not the files."""
    path = Path(directory) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {MANIFEST}: it was not written completely, or is not such a directory"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); use another copy") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise UserError(f"{path} is not a manifest; use another copy")
    if manifest.get("format") not in (1, FORMAT):
        raise UserError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}; update the project")
    checksum = manifest.pop("checksum", None)
    if (checksum is not None or manifest["format"] != 1) and text != _with_checksum(manifest):
        raise UserError(f"{path} is damaged: it does not match its own checksum; use another copy")
    return manifest


def _with_checksum(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest file. Every byte counts: any other text that reads as the same object is damage."""
    body = json.dumps(manifest, indent=1)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}, indent=1) + "\n"


def sha256_file(path: Path | str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_damaged_aside(path: Path) -> None:
    """Make room at `path`, where something unusable of ours may stand; `remove_leftovers` deletes it."""
    if path.exists():
        path.rename(path.with_name(f".{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}"))


def remove_leftovers(parent: Path) -> None:
    """Delete temporary entries that a killed process left in `parent`. Only for a parent that has one writer.

    A directory whose replacement was cut short comes back.
    """
    for old in parent.glob(f".*{OLD_MARK}"):
        _end_replacement(parent / old.name.removeprefix(".").removesuffix(OLD_MARK))
    for leftover in parent.glob(f".*{TEMPORARY_MARK}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _fsync_file(path: Path) -> None:
    step_hook("fsync")
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename to `path`; a directory that stands there is `temporary` afterwards, or gone."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        # Two renames, with an instant in between without a directory; `remove_leftovers` ends it after a kill.
        try:
            path.rename(_aside(path))
            step_hook("between")
            temporary.rename(path)
        finally:
            _end_replacement(path)
    fsync_directory(path.parent)


def _aside(path: Path) -> Path:
    """Where a directory waits while another takes its place."""
    return path.with_name(f".{path.name}{OLD_MARK}")


def _end_replacement(path: Path) -> None:
    """The directory that was set aside goes, or, where nothing has taken its place, comes back."""
    if path.exists():
        shutil.rmtree(_aside(path), ignore_errors=True)
    else:
        _aside(path).rename(path)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one instant; False where the system (only Linux has it) or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_working_directory, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return rename is not None and not rename(
        at_working_directory, os.fsencode(first), at_working_directory, os.fsencode(second), exchange
    )
