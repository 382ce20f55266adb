"""Token files in Megatron-LM's layout, `PREFIX.bin` and `PREFIX.idx`: the layout, and how to read it.

`.bin` holds the tokens of all documents, one after the other, and nothing else. `.idx`, little endian:

    9 bytes   magic `MMIDIDX\\0\\0`
    u64       version, 1
    u8        dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
    u64       number of sequences n
    u64       number of documents + 1
    i32 [n]   tokens of each sequence
    i64 [n]   byte at which each sequence starts in `.bin`
    i64 [...] index of the first sequence of each document, and n

We write one sequence per document (`trainkit.data.megatron_writer`), and the bytes are those that megatron-core writes.
We read any number of sequences per document. Tokens are integers: the two codes of floats are refused.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainkit import artifacts
from trainkit.data.token_manifest import TokenManifest, manifest_path, read_manifest
from trainkit.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: Mapping[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""The integer types of the layout by their code."""

FLOAT_CODES = {6: "float64", 7: "float32"}
HEADER = struct.Struct("<9sQBQQ")
CHUNK = 1 << 18
"""Numbers that one vectorised pass over an index or a token file takes at a time: bounds memory, stays in the cache."""

_STRIDE = 64

IntArray = npt.NDArray[np.integer[Any]]


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron-LM would take for ids below `vocab_size`: 16 bits below 65,500 ids, else `int32`."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


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
    def _landmarks(self) -> npt.NDArray[np.int64]:
        return self.document_pointers[::_STRIDE].copy()

    def documents_up_to(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many documents begin at or before each byte of `.bin`, of any shape.

        `np.searchsorted` over all documents would copy the table, which the file does not align. So it searches every
        64th, and the few in between are counted.
        """
        first = (np.searchsorted(self._landmarks, positions, side="right") - 1) * _STRIDE
        near = first[..., None] + np.arange(_STRIDE)
        inside = near < len(self)
        near[~inside] = 0
        return first + ((self.document_pointers[near] <= positions[..., None]) & inside).sum(axis=-1)

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
        chunks = [self.tokens[start : start + CHUNK] for start in range(0, len(self.tokens), CHUNK)]
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
    """Check both files against the SHA-256 in their manifest, and return it; a `UserError` names the damaged ones."""
    manifest = IndexedTokens.open(prefix).manifest
    if manifest is None:
        raise UserError(
            f"{manifest_path(prefix)} does not exist: nothing to verify {prefix} against; make the files again"
        )
    paths = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    damaged = [
        str(path) for name, path in paths.items() if artifacts.sha256_file(path) != manifest.files[name]["sha256"]
    ]
    if damaged:
        raise UserError(
            f"the content of {' and '.join(damaged)} does not match its SHA-256: damaged; make the files again, with "
            "uv run transformerlm-make-data --force (or the pipeline's --force, where that made them)"
        )
    return manifest


def verify_all(prefixes: Iterable[Path | str]) -> list[TokenManifest]:
    """`verify` of each; one `UserError`, a line for each prefix, names all that are damaged."""
    manifests: list[TokenManifest] = []
    problems: list[str] = []
    for prefix in prefixes:
        try:
            manifests.append(verify(prefix))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return manifests


def _map_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The dtype and views of the three tables, after the checks of the header."""
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    if len(data) < HEADER.size:
        raise UserError(f"{path} is cut off within its header; make the files again")
    magic, version, code, sequences, boundaries = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise UserError(f"{path} has the wrong magic {magic!r}: it is not a Megatron-LM index; check the prefix")
    if version != VERSION:
        raise UserError(f"{path} has version {version}, only {VERSION} can be read; make the files again")
    if code not in DTYPE_CODES:
        what = (
            f"which stands for {FLOAT_CODES[code]}: tokens are integers" if code in FLOAT_CODES else "which is no type"
        )
        raise UserError(f"{path} has dtype code {code}, {what}; make the files again")
    if boundaries < 1 or sequences < 1:
        raise UserError(
            f"{path} announces {sequences} sequences and {boundaries} document indices; make the files again"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if len(data) != expected:
        raise UserError(f"{path} has {len(data)} bytes where its header announces {expected}; make the files again")
    first, second = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    return (
        DTYPE_CODES[code],
        data[HEADER.size : first].view("<i4"),
        data[first:second].view("<i8"),
        data[second:].view("<i8"),
    )


def _check_pointers(path: Path, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], itemsize: int) -> int:
    """Sequences must follow each other without gap or overlap; returns the byte behind the last."""
    expected = 0
    for start in range(0, len(lengths), CHUNK):
        length = lengths[start : start + CHUNK].astype(np.int64) * itemsize
        if (length < 0).any():
            raise UserError(f"{path} has the negative length {length.min() // itemsize}; make the files again")
        ends = expected + np.cumsum(length)
        wrong = np.flatnonzero(pointers[start : start + CHUNK] != ends - length)
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
    return (values[start : start + CHUNK + 1] for start in range(0, max(1, len(values) - 1), CHUNK))
