"""A record survives the trip through its line, and the line is JSON for everybody."""

from __future__ import annotations

import json
import math
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.errors import UserError
from trainkit.logging.records import (
    Record,
    decode_record,
    describe,
    encode_record,
    format_value,
    read_records,
    stamp,
    throughput,
)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
records = st.builds(
    lambda kind, step, time, rest: {"kind": kind, "step": step, "time": time} | rest,
    st.sampled_from(["train", "eval", "sample"]),
    st.integers(0, 10**12),
    st.floats(0, 1e10),
    st.dictionaries(st.text(min_size=1).filter(lambda name: name not in ("kind", "step", "time")), scalars),
)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@given(records)
def test_a_record_reads_back_as_it_was(record: Record) -> None:
    line = encode_record(record)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    line.decode("ascii")
    back = decode_record(line)
    assert back == record
    assert [type(value) for value in back.values()] == [type(value) for value in record.values()]
    assert list(back) == list(record)


@given(st.floats())
def test_every_float_keeps_its_bits_and_every_line_is_json(value: float) -> None:
    line = encode_record(stamp({"kind": "train", "step": 1, "loss": value}))
    back = json.loads(line, parse_constant=refuse_constant)["loss"]
    if math.isnan(value):
        assert back == "NaN" and math.isnan(float(back))
    else:
        assert struct.pack("<d", float(back)) == struct.pack("<d", value)


def test_jq_reads_hostile_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    texts = ['a "quote"\n', "line\u2028end", "\ud800 alone", "\x1b[31m", "日本語"]
    path.write_bytes(
        b"".join(encode_record(stamp({"kind": "sample", "step": 1, "text": t, "x": math.inf})) for t in texts)
    )
    try:
        result = subprocess.run(["jq", "-c", ".x", path], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("jq is not installed")
    assert result.stdout == '"Infinity"\n' * len(texts)
    assert [record["text"] for record in read_records(path)] == [t.replace("\ud800", "\ufffd") for t in texts]


@pytest.mark.parametrize("value", [[1], {"a": 1}, object()])
def test_only_scalars_are_recorded(value: object) -> None:
    with pytest.raises(TypeError, match="'bad'"):
        encode_record({"kind": "train", "step": 1, "time": 0.0, "bad": value})  # type: ignore[dict-item]


def test_the_header_comes_first_and_a_given_time_stays() -> None:
    assert list(stamp({"loss": 1.0, "step": 3, "kind": "train"})) == ["kind", "step", "time", "loss"]
    assert stamp({"kind": "train", "step": 3, "time": 7.0})["time"] == 7.0


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [encode_record(stamp({"kind": "train", "step": step})) for step in range(3)]
    whole = b"".join(lines)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert len(list(read_records(path))) == whole[:size].count(b"\n")


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"{}", b"", b"\xff"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    line = encode_record(stamp({"kind": "train", "step": 1}))
    path.write_bytes(line + damage + b"\n" + line)
    with pytest.raises(UserError, match=r"line 2 of .*metrics.jsonl"):
        list(read_records(path))


def test_throughput_is_found_by_its_name() -> None:
    record: Record = {"kind": "train", "step": 1, "flops_per_second": 1e12, "tokens_per_second": 5.0}
    assert throughput(record) == ("tokens", 5.0)
    assert throughput({"kind": "train", "step": 1, "flops_per_second": 1e12}) is None


def test_records_are_described_in_one_line() -> None:
    assert describe({"kind": "message", "step": 1, "time": 0.0, "text": "saved"}) == "saved"
    assert describe({"kind": "eval", "step": 9, "time": 0.0, "val_loss": 2.34567}) == "step 9  eval  val_loss 2.346"
    assert describe({"kind": "train", "step": 9, "time": 0.0, "tokens": 8192}) == "step 9  tokens 8,192"
    assert [format_value(v) for v in (3e-4, 123456.7, "NaN", math.nan, True)] == [
        "0.0003",
        "123,457",
        "NaN",
        "nan",
        "True",
    ]
