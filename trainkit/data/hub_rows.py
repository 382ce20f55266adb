"""The texts in a data file of the hub, from any row on: the rows that the hub's viewer shows, in their order.

- `.parquet`: rows of the text column; no other column is read.
- `.jsonl` (`.json`, `.ndjson`): lines; blank ones are no rows.
- `.txt`: every line is a row, without its line break (`\\n`, `\\r\\n` or `\\r`); blank lines are empty rows.

The latter two may be compressed (`.gz`).
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

from trainkit.errors import UserError

Open = Callable[[int], io.BufferedReader]
"""Opens the file; takes the least number of bytes to ask for at once."""

SUFFIXES = (".parquet", ".jsonl", ".json", ".ndjson", ".txt")
_SEQUENTIAL = 4 << 20
"""Bytes of a request where a file is read from front to back."""
_SPARSE = 64 << 10
"""Bytes of a request where the reader knows how much it wants."""
_BATCH_ROWS = 256


def is_readable(path: str) -> bool:
    return path.removesuffix(".gz").endswith(SUFFIXES) and not path.endswith(".parquet.gz")


def read_rows(path: str, name: str, open_file: Open, text_field: str, start: int) -> Iterator[str]:
    """The texts from row `start` on. `path` tells the format, `name` is for messages."""
    if path.endswith(".parquet"):
        return _parquet(open_file, name, text_field, start)
    compressed = path.endswith(".gz")
    if path.removesuffix(".gz").endswith(".txt"):
        lines = _lines(open_file, name, compressed=compressed, newline=None)
        return (line.removesuffix("\n") for line in islice(lines, start, None))
    # A lone carriage return is white space in JSON, not the end of a row.
    return _json_rows(_lines(open_file, name, compressed=compressed, newline="\n"), name, text_field, start)


def _parquet(open_file: Open, name: str, text_field: str, start: int) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(_SPARSE) as stream, pq.ParquetFile(stream) as file:
            if text_field not in file.schema_arrow.names:
                raise UserError(_no_column(name, text_field, file.schema_arrow.names))
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start >= row + rows:
                    row += rows
                    continue
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[text_field], use_threads=False)
                for batch in batches:
                    if start < row + len(batch):
                        texts = batch.column(0)[max(start - row, 0) :].to_pylist()
                        for number, text in enumerate(texts, start=max(start, row)):
                            yield _checked(text, name, number, text_field)
                    row += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # of its structure, of a page, of a text
        message = " ".join(str(error).split())
        raise UserError(f"{name} is not a sound Parquet file ({message}); tell its owner") from error


def _lines(open_file: Open, name: str, *, compressed: bool, newline: str | None) -> Iterator[str]:
    with open_file(_SEQUENTIAL) as stream:
        binary = cast(io.BufferedReader, gzip.GzipFile(fileobj=stream)) if compressed else stream
        try:
            yield from io.TextIOWrapper(binary, encoding="utf-8", newline=newline)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{name} is not a complete gzip file ({error}); tell its owner") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not valid UTF-8 ({error.reason}); tell its owner") from error


def _json_rows(lines: Iterator[str], name: str, text_field: str, start: int) -> Iterator[str]:
    for number, line in enumerate(islice((line for line in lines if line.strip()), start, None), start=start):
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:  # of the syntax; of too many digits; of too many brackets
            raise UserError(f"row {number} of {name} is not a line of JSON ({error}); tell its owner") from error
        if not isinstance(row, dict) or text_field not in row:
            columns = list(cast("dict[str, Any]", row)) if isinstance(row, dict) else []
            raise UserError(_no_column(f"row {number} of {name}", text_field, columns))
        yield _checked(cast("dict[str, Any]", row)[text_field], name, number, text_field)


def _checked(text: object, name: str, row: int, text_field: str) -> str:
    if not isinstance(text, str):
        found = "nothing" if text is None else type(text).__name__
        raise UserError(f"row {row} of {name} has {found} in {text_field!r}, not a string; name another text_field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"row {row} of {name} holds half of a surrogate pair; name another text_field") from error
    return text


def _no_column(name: str, text_field: str, columns: list[str]) -> str:
    return f"{name} has no column {text_field!r}; it has {', '.join(columns) or 'none'}: set text_field"
