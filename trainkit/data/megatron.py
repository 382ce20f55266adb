"""Token files in Megatron-LM's layout, `PREFIX.bin` and `PREFIX.idx`, with a manifest `PREFIX.json` beside them.

`.bin` holds the tokens of all documents, one after the other, and nothing else. `.idx`, little endian:

    9 bytes   magic `MMIDIDX\\0\\0`
    u64       version, 1
    u8        dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    u64       number of sequences n
    u64       number of documents + 1
    i32 [n]   tokens of each sequence
    i64 [n]   byte at which each sequence starts in `.bin`
    i64 [...] index of the first sequence of each document, and n

We write one sequence per document, and the bytes are those that megatron-core writes. We read any number of sequences
per document. Tokens are integers: the two codes of floats are refused.

The manifest carries what the layout has no room for: SHA-256 of both files, the largest token, the UTF-8 bytes of the
text (bits per byte needs them), which tokenizer and which source. Files without one (made by Megatron) open too.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trainkit import artifacts
from trainkit.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
MANIFEST_FORMAT = 1
DTYPE_CODES: Mapping[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""The integer types of the layout by their code."""

_KINDS = ("json", "bin", "idx")
"""The three files in the order in which they take their places. The index is the last: it makes the others valid."""
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 18
"""Numbers that one vectorised pass over an index or a token file takes at a time: bounds memory, stays in the cache."""

IntArray = npt.NDArray[np.integer[Any]]


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron-LM would take for ids below `vocab_size`: 16 bits below 65,500 ids, else `int32`."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


def manifest_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.json")


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """`PREFIX.json`: what the two files hold and where that came from. It names no path, so that the files may move."""

    format: int = MANIFEST_FORMAT
    files: dict[str, dict[str, Any]]
    """`{"bin": {"bytes": …, "sha256": …}, "idx": …}`."""
    dtype: str
    tokens: int
    documents: int
    min_token: int
    max_token: int
    text_bytes: int = 0
    """UTF-8 bytes of the text that the tokens stand for; 0 = not known."""
    tokenizer: str = ""
    """Content hash of the tokenizer; empty = not known."""
    source: dict[str, Any]
    """What the tokens were made from, in the words of the program that made them."""

    @property
    def identity(self) -> str:
        """Hash of the content of both files."""
        return hashlib.sha256(f"{self.files['bin']['sha256']}{self.files['idx']['sha256']}".encode()).hexdigest()


def read_manifest(prefix: Path | str) -> TokenManifest | None:
    """The manifest of a prefix, None where there is none; `UserError` where it was damaged or changed by hand."""
    content = _manifest_content(prefix)
    if content is None:
        return None
    path = manifest_path(prefix)
    if content.get("format") != MANIFEST_FORMAT:
        found = content.get("format")
        raise UserError(f"{path} has format {found}, this version reads {MANIFEST_FORMAT}; make the files again")
    if content.pop("checksum") != _checksum(content):
        raise UserError(f"{path} does not match its own checksum: it was damaged or changed; make the files again")
    return TokenManifest(**content)


def _manifest_content(prefix: Path | str) -> dict[str, Any] | None:
    """The JSON of a manifest, None where there is none. A file of another kind (raw data, say) is a `UserError`."""
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "checksum" in content and "files" in content:
            return dict(content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError):
        pass
    raise UserError(f"{path} is not a manifest of token files; choose another prefix, or remove it")


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest_text(manifest: TokenManifest) -> str:
    content = asdict(manifest)
    content["checksum"] = _checksum(content)
    return json.dumps(content, indent=1) + "\n"


class IndexedWriter:
    """Streams documents into a prefix; use it in a `with` block.

    Documents are appended with `add`. When the block ends well the files appear under their names, the index last;
    on any exception (Ctrl-C included) nothing of them is left and what stood there before is untouched. Memory does not
    grow with the number of documents: the lengths wait in the unfinished index on the disk.
    """

    def __init__(
        self,
        prefix: Path | str,
        dtype: npt.DTypeLike,
        *,
        tokenizer: str = "",
        source: Mapping[str, Any] | None = None,
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
        self._bin_hash = hashlib.sha256()
        self._code = codes[self.dtype]
        self._tokenizer = tokenizer
        self.source = dict(source or {})
        """May be completed until the block ends."""

    def __enter__(self) -> IndexedWriter:
        artifacts.make_directory(self.prefix.parent)
        _manifest_content(self.prefix)  # never replace a file that is not ours
        _remove_leftovers(self.prefix)
        hidden, mark = f".{self.prefix.name}", f"{artifacts.TEMPORARY_MARK}{secrets.token_hex(4)}"
        self._temporary = {kind: self.prefix.with_name(f"{hidden}.{kind}{mark}") for kind in _KINDS}
        self._files: dict[str, BinaryIO] = {}
        try:
            with artifacts.explain_failed_writes(self.prefix):
                for kind in ("bin", "idx"):
                    self._files[kind] = _open_locked(self._temporary[kind])
                self._files["idx"].write(bytes(_HEADER.size))
            artifacts.step_hook("write")
        except BaseException:
            self._discard()
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
        data = tokens.astype(self.dtype).tobytes()
        self._bin_hash.update(data)
        with artifacts.explain_failed_writes(self.prefix):
            self._files["bin"].write(data)
            self._files["idx"].write(lengths.astype("<i4").tobytes())
        self.tokens += len(tokens)
        self.documents += len(lengths)
        self.text_bytes += text_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with artifacts.explain_failed_writes(self.prefix):
                    self._publish()
        finally:
            self._discard()

    def _discard(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk: closing tries to flush once more
                file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def _publish(self) -> None:
        if not self.tokens:
            raise UserError(f"{self.prefix} would hold no tokens; give it at least one document that is not empty")
        artifacts.step_hook("seal")
        self._finish_index()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        digests = {"bin": self._bin_hash.hexdigest(), "idx": artifacts.sha256_file(self._temporary["idx"])}
        manifest = TokenManifest(
            files={k: {"bytes": self._temporary[k].stat().st_size, "sha256": digests[k]} for k in ("bin", "idx")},
            dtype=self.dtype.name,
            tokens=self.tokens,
            documents=self.documents,
            min_token=self.min_token,
            max_token=self.max_token,
            text_bytes=self.text_bytes,
            tokenizer=self._tokenizer,
            source=self.source,
        )
        with self._temporary["json"].open("x", encoding="utf-8") as file:
            file.write(_manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
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
                self._temporary[kind].rename(_place(self.prefix, kind))
                artifacts.step_hook("between")
            artifacts.fsync_directory(self.prefix.parent)
        except BaseException:
            if self._temporary["idx"].exists():
                for kind in _KINDS:
                    if not self._temporary[kind].exists():
                        _place(self.prefix, kind).unlink(missing_ok=True)
            raise
        finally:
            _end_replacement(self.prefix)

    def _finish_index(self) -> None:
        """Behind the lengths, which are there already, the byte pointers and the document indices; then the header."""
        count = self.documents
        position = 0
        index = self._files["idx"]
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            index.seek(_HEADER.size + 4 * start)
            lengths = np.frombuffer(index.read(4 * size), "<i4").astype(np.int64)
            ends = position + np.cumsum(lengths * self.dtype.itemsize)
            pointers = ends - lengths * self.dtype.itemsize
            index.seek(_HEADER.size + 4 * count + 8 * start)
            index.write(pointers.astype("<i8").tobytes())
            position = int(ends[-1])
        for start in range(0, count + 1, _CHUNK):
            index.write(np.arange(start, min(start + _CHUNK, count + 1), dtype="<i8").tobytes())
        index.seek(0)
        index.write(_HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))


def _open_locked(path: Path) -> BinaryIO:
    file = path.open("x+b")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


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


def _remove_leftovers(prefix: Path) -> None:
    """Delete what a killed writer of this prefix left. A lock, which dies with its process, protects a living one's."""
    for kind in reversed(_KINDS):  # a living writer holds the lock of its index to the end
        for leftover in prefix.parent.glob(f".{glob.escape(prefix.name)}.{kind}{artifacts.TEMPORARY_MARK}*"):
            with leftover.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    message = f"another process is writing {prefix}; wait for it or choose another prefix"
                    raise UserError(message) from None
            leftover.unlink(missing_ok=True)
    _end_replacement(prefix)


@dataclass(frozen=True, eq=False)
class IndexedTokens:
    """A prefix, memory-mapped. `open` has checked the structure (not the hashes: `verify` does)."""

    prefix: Path
    tokens: IntArray
    """All tokens in a row, [tokens], of the file's own dtype; a view of the file, nothing is copied."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each sequence, [sequences], mapped."""
    pointers: npt.NDArray[np.int64]
    """Byte at which each sequence starts in `.bin`, [sequences], mapped."""
    document_indices: npt.NDArray[np.int64]
    """First sequence of each document, and the number of sequences, [documents + 1], mapped."""
    manifest: TokenManifest | None

    @classmethod
    def open(cls, prefix: Path | str) -> IndexedTokens:
        """Map a prefix; a `UserError` names the file and the field that is wrong."""
        prefix = Path(prefix)
        for path, other in ((bin_path(prefix), idx_path(prefix)), (idx_path(prefix), bin_path(prefix))):
            if not path.is_file():
                half = f", but {other.name} does" if other.is_file() else ""
                raise UserError(
                    f"{path} does not exist{half}; give the prefix without .bin or .idx, or make the files again"
                )
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty; make the files again")
        dtype, lengths, pointers, document_indices = _map_index(idx_path(prefix))
        _check_documents(idx_path(prefix), document_indices, len(lengths))
        end = _check_pointers(idx_path(prefix), lengths, pointers, dtype.itemsize)
        size = bin_path(prefix).stat().st_size
        if end != size:
            raise UserError(
                f"{bin_path(prefix)} has {size} bytes where the lengths in {idx_path(prefix).name} sum to {end}: "
                "one of the files is cut off or belongs to another; make them again"
            )
        tokens = np.asarray(np.memmap(bin_path(prefix), dtype, mode="r"))
        manifest = read_manifest(prefix)
        self = cls(prefix, tokens, lengths, pointers, document_indices, manifest)
        if manifest is not None:
            self._check_manifest(manifest)
        return self

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @cached_property
    def document_pointers(self) -> npt.NDArray[np.int64]:
        """Byte at which each document starts in `.bin`, int64 [documents]; mapped where a document is one sequence."""
        if all((np.diff(part) == 1).all() for part in _overlapping(self.document_indices)):
            return self.pointers
        end = np.array([len(self.tokens) * self.tokens.itemsize])
        return np.concatenate([self.pointers, end])[self.document_indices[:-1]]

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Token at which each document starts, and the number of tokens: int64 [documents + 1], made on first use."""
        starts = self.document_pointers // self.tokens.itemsize
        return np.append(starts, len(self.tokens))

    def document(self, index: int) -> IntArray:
        """The tokens of one document, a view of the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.prefix}")
        start = int(self.document_pointers[index]) // self.tokens.itemsize
        sequences = slice(int(self.document_indices[index]), int(self.document_indices[index + 1]))
        return self.tokens[start : start + int(self.lengths[sequences].sum(dtype=np.int64))]

    @cached_property
    def identity(self) -> str:
        """Hash that tells these data from others, wherever they lie.

        It covers the content of both files where a manifest has recorded it; else the index and the size of `.bin`.
        """
        if self.manifest is not None:
            return self.manifest.identity
        return hashlib.sha256(
            f"{self.tokens.nbytes} {artifacts.sha256_file(idx_path(self.prefix))}".encode()
        ).hexdigest()

    @cached_property
    def token_range(self) -> tuple[int, int]:
        """Smallest and largest of the tokens and 0: from the manifest, or, where there is none, by reading the file."""
        if self.manifest is not None:
            return self.manifest.min_token, self.manifest.max_token
        chunks = [self.tokens[start : start + _CHUNK] for start in range(0, len(self.tokens), _CHUNK)]
        return min(0, *(int(chunk.min()) for chunk in chunks)), max(0, *(int(chunk.max()) for chunk in chunks))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse tokens outside of [0, vocab_size): the data were made with another tokenizer."""
        low, high = self.token_range
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{bin_path(self.prefix)} holds token {low if low < 0 else high}, the vocabulary has {vocab_size}: "
                "it was made with another tokenizer; make it again with this one"
            )

    def _check_manifest(self, manifest: TokenManifest) -> None:
        recorded = (manifest.dtype, manifest.tokens, manifest.documents, manifest.files["bin"]["bytes"])
        found = (self.tokens.dtype.name, len(self.tokens), len(self), self.tokens.nbytes)
        for name, expected, actual in zip(("dtype", "tokens", "documents", "bytes"), recorded, found, strict=True):
            if expected != actual:
                raise UserError(
                    f"{manifest_path(self.prefix)} says {name} {expected}, the files hold {actual}: "
                    "they do not belong together; make them again"
                )


def verify(prefix: Path | str) -> TokenManifest:
    """Check both files against the SHA-256 in their manifest, and return it; a `UserError` names the damaged file."""
    manifest = IndexedTokens.open(prefix).manifest
    if manifest is None:
        raise UserError(
            f"{manifest_path(prefix)} does not exist: nothing to verify {prefix} against; make the files again"
        )
    for name, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        if artifacts.sha256_file(path) != manifest.files[name]["sha256"]:
            raise UserError(f"the content of {path} does not match its SHA-256: it is damaged; make the files again")
    return manifest


def _map_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The dtype and views of the three tables, after the checks of the header."""
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    if len(data) < _HEADER.size:
        raise UserError(f"{path} is cut off within its header; make the files again")
    magic, version, code, sequences, boundaries = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if magic != MAGIC:
        raise UserError(f"{path} has the wrong magic {magic!r}: it is not a Megatron-LM index; check the prefix")
    if version != VERSION:
        raise UserError(f"{path} has version {version}, only {VERSION} can be read; make the files again")
    if code not in DTYPE_CODES:
        raise UserError(f"{path} has dtype code {code}, which is no integer type; make the files again")
    if boundaries < 1 or sequences < 1:
        raise UserError(
            f"{path} announces {sequences} sequences and {boundaries} document indices; make the files again"
        )
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if len(data) != expected:
        raise UserError(f"{path} has {len(data)} bytes where its header announces {expected}; make the files again")
    first, second = _HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences
    return (
        DTYPE_CODES[code],
        data[_HEADER.size : first].view("<i4"),
        data[first:second].view("<i8"),
        data[second:].view("<i8"),
    )


def _check_pointers(path: Path, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], itemsize: int) -> int:
    """Sequences must follow each other without gap or overlap; returns the byte behind the last."""
    expected = 0
    for start in range(0, len(lengths), _CHUNK):
        length = lengths[start : start + _CHUNK].astype(np.int64) * itemsize
        if (length < 0).any():
            raise UserError(f"{path} has the negative length {length.min() // itemsize}; make the files again")
        ends = expected + np.cumsum(length)
        wrong = np.flatnonzero(pointers[start : start + _CHUNK] != ends - length)
        if len(wrong):
            at = start + int(wrong[0])
            raise UserError(
                f"{path} has byte pointer {pointers[at]} for sequence {at}, its lengths give "
                f"{(ends - length)[wrong[0]]}; make the files again"
            )
        expected = int(ends[-1])
    return expected


def _check_documents(path: Path, indices: npt.NDArray[np.int64], sequences: int) -> None:
    if (
        indices[0] != 0
        or indices[-1] != sequences
        or any((part[1:] < part[:-1]).any() for part in _overlapping(indices))
    ):
        raise UserError(
            f"{path} has document indices that do not rise from 0 to its {sequences} sequences; make it again"
        )


def _overlapping(values: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Chunks that share one element with the next."""
    return (values[start : start + _CHUNK + 1] for start in range(0, max(1, len(values) - 1), _CHUNK))
