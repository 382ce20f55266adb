"""Writing token files in Megatron-LM's layout: whole or not at all, and not from the beginning after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trainkit import artifacts
from trainkit.data.megatron import CHUNK, DTYPE_CODES, HEADER, MAGIC, VERSION, IntArray, idx_path
from trainkit.data.token_manifest import TokenManifest, checksum, manifest_content, manifest_text
from trainkit.errors import UserError

_KINDS = ("json", "bin", "idx")
"""The three files in the order in which they take their places. The index is the last: it makes the others valid."""
_READ_BYTES = 1 << 22


def is_unfinished(prefix: Path | str) -> bool:
    """Whether a build of this prefix was stopped that the next one goes on with, or is under way."""
    return _temporary(Path(prefix), "progress").exists()


class IndexedWriter:
    """Streams documents into a prefix; use it in a `with` block.

    Documents are appended with `add`. When the block ends well the files appear under their names, the index last;
    on any exception (Ctrl-C included) what stood there before is untouched. Memory does not grow with the number of
    documents: the lengths wait in the unfinished index on the disk.

    `save` keeps what has been written so far, whatever happens then: the next writer of the same prefix, dtype,
    tokenizer and source goes on behind it, unless it is told to `start_over`. `documents` and `source` say where it
    stands. Without a `save`, an exception leaves nothing.
    """

    def __init__(
        self,
        prefix: Path | str,
        dtype: npt.DTypeLike,
        *,
        tokenizer: str = "",
        source: Mapping[str, Any] | None = None,
        start_over: bool = False,
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {known: code for code, known in DTYPE_CODES.items()}
        if self.dtype not in codes:
            names = ", ".join(known.name for known in codes)
            raise UserError(f"tokens of {self.prefix} cannot be stored as {self.dtype.name}; choose one of {names}")
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0
        self.min_token = self.max_token = 0
        self._bin_hash, self._lengths_hash = hashlib.sha256(), hashlib.sha256()
        self._code = codes[self.dtype]
        self._tokenizer = tokenizer
        self.source = dict(source or {})
        """May be completed until the block ends."""
        self._made_of = checksum({"dtype": self.dtype.name, "tokenizer": tokenizer, "source": self.source})
        self._start_over = start_over
        self._keeps_files = False
        """Whether what stands under the temporary names is to stay there."""

    def __enter__(self) -> IndexedWriter:
        artifacts.make_directory(self.prefix.parent)
        manifest_content(self.prefix)  # never replace a file that is not ours
        self._files: dict[str, BinaryIO] = {}
        try:
            with artifacts.explain_failed_writes(self.prefix):
                for kind in ("idx", "bin", "progress"):  # the lock of the index protects the others
                    self._files[kind] = _open(self._temporary(kind), lock=kind == "idx", prefix=self.prefix)
                _end_replacement(self.prefix)
                if self._start_over or not self._take_up():
                    for file in self._files.values():
                        file.seek(0)
                        file.truncate()
                    self._files["idx"].write(bytes(HEADER.size))
            artifacts.step_hook("write")
        except BaseException:
            self._close()
            raise
        return self

    def add(self, tokens: IntArray, lengths: IntArray | None = None, *, text_bytes: int = 0) -> None:
        """Append documents: `tokens` [n] is one document, or several in a row that `lengths` (summing to n) cuts.

        `text_bytes` counts the UTF-8 bytes of their text. A token that the dtype cannot hold is a `UserError`.
        """
        lengths = np.array([len(tokens)]) if lengths is None else lengths
        assert tokens.ndim == 1 and int(lengths.sum()) == len(tokens) and (lengths >= 0).all()
        if len(tokens):
            bounds = np.iinfo(self.dtype.name)
            low, high = int(tokens.min()), int(tokens.max())
            if low < bounds.min or high > bounds.max:
                value = low if low < bounds.min else high
                raise UserError(f"token {value} does not fit {self.dtype.name} in {self.prefix}; choose a larger dtype")
            self.min_token, self.max_token = min(self.min_token, low), max(self.max_token, high)
        if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
            raise UserError(f"a document of {lengths.max()} tokens is too long for {self.prefix}.idx; split it")
        data, entries = tokens.astype(self.dtype).tobytes(), lengths.astype("<i4").tobytes()
        self._bin_hash.update(data)
        self._lengths_hash.update(entries)
        with artifacts.explain_failed_writes(self.prefix):
            self._files["bin"].write(data)
            self._files["idx"].write(entries)
        self.tokens += len(tokens)
        self.documents += len(lengths)
        self.text_bytes += text_bytes

    # -- surviving a kill ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Make what has been added so far durable: another line of the journal, after the files are on the disk."""
        record = {
            "made_of": self._made_of,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "min_token": self.min_token,
            "max_token": self.max_token,
            "source": self.source,
            "bin_sha256": self._bin_hash.hexdigest(),
            "lengths_sha256": self._lengths_hash.hexdigest(),
        }
        with artifacts.explain_failed_writes(self.prefix):
            _flush(self._files["bin"])
            _flush(self._files["idx"])
            line = json.dumps({**record, "checksum": checksum(record)}) + "\n"
            self._files["progress"].write(line.encode())
            _flush(self._files["progress"])
        self._keeps_files = True
        artifacts.step_hook("saved")

    def _take_up(self) -> bool:
        """Go on where an unfinished build of the same things was saved last; False where no sound one is there."""
        record = _last_record(self._files["progress"])
        if record is None or record["made_of"] != self._made_of:
            return False
        data, entries = self._files["bin"], self._files["idx"]
        data_bytes, entry_bytes = record["tokens"] * self.dtype.itemsize, 4 * record["documents"]
        entries.seek(HEADER.size)
        bin_hash, lengths_hash = _hash_of(data, data_bytes), _hash_of(entries, entry_bytes)
        if (bin_hash.hexdigest(), lengths_hash.hexdigest()) != (record["bin_sha256"], record["lengths_sha256"]):
            return False
        for file, end in ((data, data_bytes), (entries, HEADER.size + entry_bytes)):
            file.seek(end)
            file.truncate()
        self.tokens, self.documents, self.text_bytes = record["tokens"], record["documents"], record["text_bytes"]
        self.min_token, self.max_token = record["min_token"], record["max_token"]
        self.source = record["source"]
        self._bin_hash, self._lengths_hash = bin_hash, lengths_hash
        self._keeps_files = True
        return True

    # -- the end -------------------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with artifacts.explain_failed_writes(self.prefix):
                    self._publish()
        finally:
            self._close()

    def _close(self) -> None:
        """Let go of the files, and of the lock last; remove them where nothing of them was saved."""
        if "idx" in self._files and not self._keeps_files:
            for kind in ("json", "bin", "progress", "idx"):
                self._temporary(kind).unlink(missing_ok=True)
        for kind in reversed(self._files):
            with suppress(OSError):  # a full disk: closing tries to flush once more
                self._files[kind].close()

    def _temporary(self, kind: str) -> Path:
        return _temporary(self.prefix, kind)

    def _publish(self) -> None:
        if not self.tokens:
            raise UserError(f"{self.prefix} would hold no tokens; give it at least one document that is not empty")
        artifacts.step_hook("seal")
        self._finish_index()
        for kind in ("bin", "idx"):
            _flush(self._files[kind])
        digests = {"bin": self._bin_hash.hexdigest(), "idx": artifacts.sha256_file(self._temporary("idx"))}
        manifest = TokenManifest(
            files={k: {"bytes": self._temporary(k).stat().st_size, "sha256": digests[k]} for k in ("bin", "idx")},
            dtype=self.dtype.name,
            tokens=self.tokens,
            documents=self.documents,
            min_token=self.min_token,
            max_token=self.max_token,
            text_bytes=self.text_bytes,
            tokenizer=self._tokenizer,
            source=self.source,
        )
        with self._temporary("json").open("wb") as file:
            file.write(manifest_text(manifest).encode())
            _flush(file)
        artifacts.step_hook("rename")
        self._move_into_place()
        artifacts.step_hook("renamed")

    def _move_into_place(self) -> None:
        """Three renames cannot be one, so the index decides: it is the first to go and the last to come.

        Without an index there are no token files, so at no instant does one stand beside tokens or a manifest that it
        does not belong to. Whatever fails before the new index is in its place brings the old files back.
        """
        try:
            for kind in reversed(_KINDS):
                if _place(self.prefix, kind).exists():
                    _place(self.prefix, kind).rename(_aside(self.prefix, kind))
                    artifacts.step_hook("between")
            for kind in _KINDS:
                if kind == "idx":
                    # With the index goes the lock: nothing of this writer may stay under a name of the next one, and
                    # what stands there from now on is not this one's to remove.
                    self._temporary("progress").unlink()
                    self._keeps_files = True
                self._temporary(kind).rename(_place(self.prefix, kind))
                artifacts.step_hook("between")
            artifacts.fsync_directory(self.prefix.parent)
        except BaseException:
            if self._temporary("idx").exists():
                self._keeps_files = False
                for kind in _KINDS:
                    if not self._temporary(kind).exists():
                        _place(self.prefix, kind).unlink(missing_ok=True)
            raise
        finally:
            _end_replacement(self.prefix)

    def _finish_index(self) -> None:
        """Behind the lengths, which are there already, the byte pointers and the document indices; then the header."""
        count = self.documents
        position = 0
        index = self._files["idx"]
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            index.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(index.read(4 * size), "<i4").astype(np.int64)
            ends = position + np.cumsum(lengths * self.dtype.itemsize)
            pointers = ends - lengths * self.dtype.itemsize
            index.seek(HEADER.size + 4 * count + 8 * start)
            index.write(pointers.astype("<i8").tobytes())
            position = int(ends[-1])
        for start in range(0, count + 1, CHUNK):
            index.write(np.arange(start, min(start + CHUNK, count + 1), dtype="<i8").tobytes())
        index.seek(0)
        index.write(HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))


def _open(path: Path, *, lock: bool, prefix: Path) -> BinaryIO:
    """Open for reading and writing at any place, made if need be; a lock dies with its process."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        if not lock:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()  # in between, its writer has given it its final name, or removed it
        except BlockingIOError:
            file.close()
            message = f"another process is writing {prefix}; wait for it or choose another prefix"
            raise UserError(message) from None


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _hash_of(file: BinaryIO, count: int) -> Any:
    """SHA-256 of the next `count` bytes, to be continued; of fewer where the file ends, which another hash shows."""
    digest = hashlib.sha256()
    while count > 0 and (data := file.read(min(count, _READ_BYTES))):
        digest.update(data)
        count -= len(data)
    return digest


def _last_record(journal: BinaryIO) -> dict[str, Any] | None:
    """The last whole line: a kill may cut off the one that it interrupts, which must not stay in front of the next."""
    found, end = None, 0
    for line in journal:
        try:
            record = json.loads(line)
            if record.pop("checksum") != checksum(record):
                break
        except (ValueError, KeyError, AttributeError):
            break
        found, end = record, end + len(line)
    journal.seek(end)
    journal.truncate()
    return found


def _temporary(prefix: Path, kind: str) -> Path:
    """Where a file grows. The name is always the same, so that the next writer finds what this one leaves."""
    return prefix.with_name(f".{prefix.name}.{kind}{artifacts.TEMPORARY_MARK}unfinished")


def _place(prefix: Path, kind: str) -> Path:
    return Path(f"{prefix}.{kind}")


def _aside(prefix: Path, kind: str) -> Path:
    """Where a file waits while another takes its place."""
    return prefix.with_name(f".{prefix.name}.{kind}.replaced")


def _end_replacement(prefix: Path) -> None:
    """The files that were set aside go, or, where no index stands in the place of theirs, come back."""
    is_complete = idx_path(prefix).exists()
    for kind in _KINDS:
        old = _aside(prefix, kind)
        if is_complete:
            old.unlink(missing_ok=True)
        elif old.exists():
            old.replace(_place(prefix, kind))
