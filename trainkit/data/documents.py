"""Text files as documents; memory holds one document at a time (of Parquet, one batch of rows).

- `.jsonl`: each row is a document, the string in its field `text_field`. Blank lines are no rows.
- `.parquet`: each row is a document, the string in its column `text_field`; no other column is read.
- `.lines` (newline shards): each line is a document, without its line break (LF or CR LF) and as it stands, with no
  escapes: who writes such a file must have replaced the line breaks inside a document. Empty lines are no documents.
- `.txt`: a document lies between lines that hold the separator and nothing else. The line break before such a line, and
  at the end of a file that has one, is no part of the document. A file without a separator line is one document, whole.
- All but Parquet, which has its own compression, may be compressed (`.jsonl.gz`, `.lines.gz`, `.txt.gz`).
- A directory stands for all such files below it, sorted by path; hidden ones and other files (a manifest, say) are left
  out.

Text is UTF-8 and is not changed in any other way; a byte order mark at the start of a file is no text.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainkit.artifacts import is_sealed, read_manifest
from trainkit.data.document_sets import ShardedDocuments
from trainkit.data.text_shards import KIND
from trainkit.errors import UserError

END_OF_TEXT_LINE = "<|endoftext|>"
SUFFIXES = (".jsonl", ".txt", ".lines", ".parquet", ".jsonl.gz", ".txt.gz", ".lines.gz")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_BATCH_ROWS = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def list_files(paths: Iterable[Path | str]) -> list[Path]:
    """The text files that `paths` stand for, directories expanded; `UserError` for one that is missing or no text."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_text_file(file, below=path))
            if not found:
                raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file; convert or rename what it holds")
            files.extend(found)
        elif not path.exists():
            raise UserError(f"{path} does not exist; check the path")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is not one of {', '.join(SUFFIXES)}; convert or rename it")
        else:
            files.append(path)
    return files


def _is_text_file(file: Path, *, below: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(below).parts)
    return not hidden and file.is_file() and file.name.endswith(SUFFIXES)


@dataclass(frozen=True)
class FileShard:
    """The documents of one file; a `trainkit.data.document_sets.Shard`."""

    path: Path
    text_field: str = "text"
    separator: str = END_OF_TEXT_LINE

    def read(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on; those before it are found, not parsed (Parquet skips them unread).

        Invalid UTF-8 or JSON, or a row without the field, is a `UserError` that names the file and the line.
        """
        match self._kind:
            case "jsonl":
                return _rows(self.path, self.text_field, start)
            case "parquet":
                return _parquet_rows(self.path, self.text_field, start)
            case "lines":
                return _whole_lines(self.path, start)
            case _:
                return _texts(self.path, self.separator, start)

    def check(self) -> None:
        """Refuse what a short look shows: Parquet that is cut off or has no such column, a first row without the field.

        A run should not find out about its last file after days.
        """
        match self._kind:
            case "jsonl":
                next(_rows(self.path, self.text_field, 0), None)
            case "parquet":
                with _open_parquet(self.path, self.text_field):
                    pass
            case _:
                pass

    @property
    def _kind(self) -> str:
        return self.path.name.removesuffix(".gz").rpartition(".")[2]


def open_local_documents(path: Path | str, *, text_field: str = "text") -> ShardedDocuments:
    """A file or folder as a data set with one shard for each file, each of them `check`ed; the rest of its content is
    checked as it is read.

    The identity holds the names of the files below `path`, their order and `fingerprint`s: the folder may move.
    """
    files = list_files([path])
    if Path(path).is_dir():
        for folder in sorted({file.parent for file in files}):
            _check_sealed(folder)
    names = [file.relative_to(path).as_posix() if file != Path(path) else file.name for file in files]
    facts = [(name, fingerprint(file)) for name, file in zip(names, files, strict=True)]
    identity = hashlib.sha256(json.dumps([facts, text_field]).encode()).hexdigest()
    shards = [FileShard(file, text_field) for file in files]
    for shard in shards:
        shard.check()
    return ShardedDocuments(shards, identity)


def _check_sealed(folder: Path) -> None:
    """Refuse shards of `trainkit.data.text_shards` of which a file is missing or has another size than their manifest
    says: what a copy that broke off leaves."""
    if not is_sealed(folder, kind=KIND):
        return
    for name, expected in read_manifest(folder)["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if size != expected["bytes"]:
            raise UserError(
                f"{folder / name} has {size} bytes where manifest.json says {expected['bytes']}: it was not copied "
                "completely; fetch it again"
            )


def fingerprint(file: Path) -> str:
    """A hash of the size and the content of a file: of all of it up to 1 MiB, of 16 blocks of a larger one.

    A run opens its data at every start, and to hash terabytes there takes hours. The last bytes are always among
    the blocks: they hold the checksum of a gzip file and the index of a Parquet file, so that a change of those is
    seen. What is not seen is a change of a large plain file that keeps its size and lies between the blocks.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            digest = hashlib.sha256(str(size).encode())
            last = max(size - _SAMPLE_BYTES, 0)
            for index in range(_SAMPLES):
                stream.seek(last * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    except OSError as error:
        raise _unreadable(file, error) from error
    return digest.hexdigest()


def iterate_documents(
    paths: Sequence[Path | str], *, text_field: str = "text", separator: str = END_OF_TEXT_LINE
) -> Iterator[str]:
    """The documents of all files in order. The paths are checked at once, the content as it is read.

    A document may be the empty string (a row whose text is empty). No document at all, or what `FileShard.read`
    refuses, is a `UserError`.
    """
    return _documents([FileShard(file, text_field, separator) for file in list_files(paths)])


def _documents(shards: list[FileShard]) -> Iterator[str]:
    empty = True
    for shard in shards:
        for document in shard.read():
            empty = False
            yield document
    if empty:
        raise UserError(f"{', '.join(str(shard.path) for shard in shards)} holds no document; give it some text")


def _lines(file: Path) -> Iterator[bytes]:
    """The lines with their line breaks, decompressed; a damaged or unreadable file is a `UserError`."""
    try:
        with cast(BinaryIO, gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")) as stream:
            first = stream.readline().removeprefix(_BYTE_ORDER_MARK)
            if first:
                yield first
            yield from stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is not a complete gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read: {error.strerror or error}; check the path and its permissions")


def _decode(data: bytes, file: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise UserError(f"{file} is not valid UTF-8 in line {at} ({error.reason}); convert it to UTF-8") from error


def _rows(file: Path, text_field: str, start: int) -> Iterator[str]:
    index = -1
    for number, line in enumerate(_lines(file), start=1):
        index += bool(line.strip())
        if index < start or not line.strip():
            continue
        try:
            row = json.loads(_decode(line, file, number))
        except (ValueError, RecursionError) as error:  # of the syntax; of too many digits; of too many brackets
            raise UserError(f"{file} line {number} is not valid JSON ({error}); repair or remove it") from error
        if not isinstance(row, dict) or text_field not in row:
            fields = f"; it has {', '.join(map(str, cast(dict[str, object], row)))}" if isinstance(row, dict) else ""
            raise UserError(
                f"{file} line {number} has no field '{text_field}'{fields}: set text_field to the right one"
            )
        text = cast(dict[str, object], row)[text_field]
        if not isinstance(text, str):
            raise UserError(f"{file} line {number}: the field '{text_field}' is {type(text).__name__}, not a string")
        if b"\\u" in line and not _is_encodable(text):
            raise UserError(
                f"{file} line {number} holds half of a surrogate pair (\\ud800…\\udfff); repair or remove it"
            )
        yield text


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(file: Path, text_field: str, start: int) -> Iterator[str]:
    with _open_parquet(file, text_field) as table:
        row = 0
        for group in range(table.num_row_groups):
            end = row + table.metadata.row_group(group).num_rows
            if start >= end:
                row = end
                continue
            for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[text_field], use_threads=False):
                for text in batch.column(0)[max(start - row, 0) :].to_pylist():
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise UserError(f"{file}: the column '{text_field}' holds {kind} in group {group}, no string")
                    yield text
                row += len(batch)


@contextmanager
def _open_parquet(file: Path, text_field: str) -> Generator[Any]:
    """The file, which ends with its index: one that is cut off is refused here."""
    # Half a second of import, for those alone who have such files.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if text_field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise UserError(
                    f"{file} has no column '{text_field}'; it has {columns}: set text_field to the right one"
                )
            yield table
    except (pa.ArrowException, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{file} is not a sound Parquet file ({message}); fetch it again") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _whole_lines(file: Path, start: int) -> Iterator[str]:
    row = -1
    for number, line in enumerate(_lines(file), start=1):
        text = _without_last_break(line)
        row += bool(text)
        if text and row >= start:
            yield _decode(text, file, number)


def _texts(file: Path, separator: str, start: int) -> Iterator[str]:
    """Documents without text are none."""
    sections = (section for section in _sections(file, separator) if section[1])
    return (_decode(text, file, line) for line, text in islice(sections, start, None))


def _sections(file: Path, separator: str) -> Iterator[tuple[int, bytes]]:
    """What lies between separators, with the number of its first line."""
    mark = separator.encode()
    pending: list[bytes] = []
    separated = False
    first_line = 1
    number = 0
    for number, line in enumerate(_lines(file), start=1):
        if line.rstrip(b"\r\n") != mark:
            pending.append(line)
            continue
        separated = True
        yield first_line, _without_last_break(b"".join(pending))
        pending = []
        first_line = number + 1
    rest = b"".join(pending)
    yield first_line, _without_last_break(rest) if separated else rest


def _without_last_break(text: bytes) -> bytes:
    return text[:-2] if text.endswith(b"\r\n") else text.removesuffix(b"\n")
