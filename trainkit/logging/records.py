"""A record: one flat JSON object, one line of `metrics.jsonl`.

    {"kind": "train", "step": 420, "time": 1767225600.5, "loss": 2.41, "learning_rate": 0.0003, ...}

`kind`, `step` and `time` (seconds since 1970) always come first; everything else is a scalar of the kind's own:

- `train`: `loss`, `loss_ema` (smoothed), `learning_rate`, `gradient_norm`, a rate such as `tokens_per_second`,
  `data_wait_fraction`, `memory_bytes`, any metric of the task;
- `norms`: `gradient_norm`, `weight_norm`, `update_ratio`, and each of them with `/<layer>`;
- `eval`: `val_loss` and any metric of a validation;
- `checkpoint`: `path` of what was saved;
- `sample`: `text`, and scalars that describe it (`prompt`, for instance);
- `message`: `text` for people.

A float reads back to the same bits. JSON has no non-finite numbers, so they are the strings "NaN", "Infinity" and
"-Infinity": every line stays valid JSON, and `float(value)` reads both forms.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from trainkit.errors import UserError

Scalar: TypeAlias = str | int | float | bool | None
Record: TypeAlias = dict[str, Scalar]

TEXT_KINDS = ("message", "sample")
"""Kinds that carry text for people; every other kind carries metrics."""
HEADER = ("kind", "step", "time")


def stamp(record: Mapping[str, Scalar]) -> Record:
    """The record with the present time, unless it has one, and its header first."""
    header: Record = {"kind": record["kind"], "step": record["step"], "time": record.get("time", time.time())}
    return header | dict(record)


def encode_record(record: Mapping[str, Scalar]) -> bytes:
    """One line, newline included. Raises `TypeError` when a value is not a scalar."""
    # Only ASCII, so that U+2028 in a sampled text does not look like a line's end to anyone.
    line = json.dumps({name: _json_scalar(name, value) for name, value in record.items()}, allow_nan=False)
    return line.encode("ascii") + b"\n"


def decode_record(line: bytes) -> Record:
    """The record of one line; `ValueError` when the line holds none."""
    record = json.loads(line)
    if not isinstance(record, dict) or not all(name in record for name in HEADER):
        raise ValueError("not a record")
    return cast(Record, record)


def read_records(path: Path | str) -> Iterator[Record]:
    """All records of a metrics file. A last line without its newline was torn by a kill and is left out."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decode_record(line)
            except ValueError:
                raise UserError(f"line {number} of {path} is not a record; remove that line") from None


def describe(record: Mapping[str, Scalar]) -> str:
    """A record as people read it, without its time; texts as they are."""
    if record["kind"] in TEXT_KINDS:
        return str(record.get("text", ""))
    values = "  ".join(f"{name} {format_value(value)}" for name, value in record.items() if name not in HEADER)
    kind = "" if record["kind"] == "train" else f"{record['kind']}  "
    return f"step {format_value(record['step'])}  {kind}{values}".rstrip()


def throughput(record: Mapping[str, Scalar]) -> tuple[str, float] | None:
    """The name of what is counted and how many a second, for instance `("tokens", 81920.0)`."""
    for name, value in record.items():
        unit = name.removesuffix("_per_second")
        if unit not in (name, "flops") and value is not None:
            return unit, float(value)
    return None


def format_value(value: Scalar) -> str:
    """Four significant digits of a fraction, all digits of a whole number."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 and math.isfinite(value) else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _json_scalar(name: str, value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        # Half a surrogate pair is legal in Python and nowhere else; jq refuses its escape.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value is None or isinstance(value, int | float):
        return value
    raise TypeError(f"a record holds scalars only, and {name!r} is a {type(value).__name__}")
