"""Text files as a stream of documents; memory holds one document at a time.

- `.jsonl`: each row is a document, the string in its field `text_field`. Blank lines are no rows.
- `.txt`: a document lies between lines that hold the separator and nothing else. The line break before such a line, and
  at the end of a file that has one, is no part of the document. A file without a separator line is one document, whole.
- Both may be compressed (`.jsonl.gz`, `.txt.gz`). A directory stands for all such files below it, sorted by path,
  hidden ones left out.

Text is UTF-8 and is not changed in any other way; a byte order mark at the start of a file is no text.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from trainkit.errors import UserError

END_OF_TEXT_LINE = "<|endoftext|>"
SUFFIXES = (".jsonl", ".txt", ".jsonl.gz", ".txt.gz")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def list_files(paths: Iterable[Path | str]) -> list[Path]:
    """The text files that `paths` stand for, directories expanded; `UserError` for one that is missing or no text."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_text_file(file, below=path))
            if not found:
                raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file; check the path")
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


def iterate_documents(
    paths: Sequence[Path | str], *, text_field: str = "text", separator: str = END_OF_TEXT_LINE
) -> Iterator[str]:
    """The documents of all files in order. The paths are checked at once, the content as it is read.

    A document may be the empty string (a row whose text is empty). No document at all, invalid UTF-8 or JSON, or a row
    without the field is a `UserError` that names the file and the line.
    """
    return _documents(list_files(paths), text_field, separator)


def _documents(files: list[Path], text_field: str, separator: str) -> Iterator[str]:
    empty = True
    for file in files:
        rows = file.name.endswith((".jsonl", ".jsonl.gz"))
        for document in _rows(file, text_field) if rows else _texts(file, separator):
            empty = False
            yield document
    if empty:
        raise UserError(f"{', '.join(map(str, files))} holds no document; give it some text")


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
        raise UserError(f"{file} cannot be read: {error.strerror}; check the path and its permissions") from error


def _decode(data: bytes, file: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        raise UserError(f"{file} is not valid UTF-8 in line {at} ({error.reason}); convert it to UTF-8") from error


def _rows(file: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(_decode(line, file, number))
        except json.JSONDecodeError as error:
            raise UserError(f"{file} line {number} is not valid JSON ({error.msg}); repair or remove it") from error
        if not isinstance(row, dict) or text_field not in row:
            fields = f"; it has {', '.join(map(str, cast(dict[str, object], row)))}" if isinstance(row, dict) else ""
            raise UserError(f"{file} line {number} has no field '{text_field}'{fields}: name the field of the text")
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


def _texts(file: Path, separator: str) -> Iterator[str]:
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
        if text := _without_last_break(b"".join(pending)):
            yield _decode(text, file, first_line)
        pending = []
        first_line = number + 1
    rest = b"".join(pending)
    if text := _without_last_break(rest) if separated else rest:
        yield _decode(text, file, first_line)


def _without_last_break(text: bytes) -> bytes:
    return text[:-2] if text.endswith(b"\r\n") else text.removesuffix(b"\n")
