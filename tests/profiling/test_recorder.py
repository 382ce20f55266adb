"""The window of `[profiling]`: which steps it records, what it writes, and that it costs and breaks nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch

from cli import train
from profiling import nvtx
from profiling.recorder import Recorder
from profiling.specs import ProfilingSpec
from tests.profiling.test_injection import files, settings

__all__ = ["files"]


def take(recorder: Recorder, steps: int, done: int = 0) -> None:
    """A loop as the real one: it waits for a step, takes it, and does something afterwards."""
    with recorder:
        for number in islice(recorder.over(_numbered(done), done), steps):
            with nvtx.range(f"step {number}"), nvtx.range("part", "fine"):
                pass
            with nvtx.range(f"after {number}"):
                pass


def _numbered(done: int) -> Iterator[int]:
    for number in count(done + 1):
        with nvtx.range(f"wait {number}"):
            pass
        yield number


def events(path: Path) -> list[dict[str, Any]]:
    trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return sorted((event for event in trace if event.get("cat") == "user_annotation"), key=lambda event: event["ts"])


def names(path: Path) -> list[str]:
    return [event["name"] for event in events(path)]


def test_exactly_the_steps_of_the_window_are_recorded(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    spec = ProfilingSpec(start_step=2, steps=2, level="coarse")
    take(Recorder(spec, tmp_path, tell=lambda text, step: told.append((text, step))), 5)
    base = tmp_path / "step-00000002-rank-0"
    assert names(base.with_suffix(".json")) == [
        f"{what} {step}" for step in (2, 3) for what in ("wait", "step", "after")
    ]
    assert "step 2" in base.with_suffix(".txt").read_text()
    [(text, step)] = told
    assert step == 3 and "steps 2 to 3" in text and str(base.with_suffix(".json")) in text and "perfetto" in text
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt"}


def test_a_run_that_goes_on_in_the_window_records_the_rest(tmp_path: Path) -> None:
    spec = ProfilingSpec(start_step=2, steps=3)
    take(Recorder(spec, tmp_path), 2)
    take(Recorder(spec, tmp_path), 9, done=2)
    first, second = (tmp_path / f"step-0000000{step}-rank-0.json" for step in (2, 3))
    assert names(first) == ["wait 2", "step 2", "part", "after 2"]
    assert [name for name in names(second) if name.startswith("step")] == ["step 3", "step 4"]


def test_a_run_that_goes_on_behind_the_window_says_so(tmp_path: Path) -> None:
    told: list[str] = []
    take(Recorder(ProfilingSpec(steps=2), tmp_path / "p", tell=lambda text, step: told.append(text)), 2, done=50)
    assert not (tmp_path / "p").exists()
    assert "profiling.start_step = 10" in told[0] and "step 51" in told[0]


def test_a_failing_run_leaves_what_there_is(tmp_path: Path) -> None:
    recorder = Recorder(ProfilingSpec(start_step=1, steps=9), tmp_path)
    with pytest.raises(ZeroDivisionError), recorder:
        for number in recorder.over(_numbered(0), 0):
            with nvtx.range(f"step {number}"):
                1 / (3 - number)
    assert names(tmp_path / "step-00000001-rank-0.json")[-1] == "step 3"
    assert nvtx.range("a") is nvtx.range("b")


def test_a_place_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    told: list[str] = []
    spec = ProfilingSpec(start_step=1, steps=1)
    take(Recorder(spec, tmp_path / "profile", tell=lambda text, step: told.append(text)), 3)
    assert "cannot be written" in told[0]


def test_off_or_on_another_rank_the_steps_are_passed_on_as_they_are(tmp_path: Path) -> None:
    steps = iter([1, 2])
    assert Recorder().over(steps, 0) is steps
    assert Recorder(ProfilingSpec(steps=1), tmp_path, rank=1).over(steps, 0) is steps
    take(Recorder(ProfilingSpec(start_step=1, steps=1, ranks="all"), tmp_path, rank=1), 2)
    assert (tmp_path / "step-00000001-rank-1.json").exists()


def test_a_real_run_writes_its_phases(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    window = ["profiling.start_step=1", "profiling.steps=2", "profiling.level=verbose", "profiling.memory_history=1000"]
    assert train.main([*settings(tmp_path, files), *window]) == 0
    found = events(tmp_path / "r" / "profile" / "step-00000001-rank-0.json")
    assert {event["name"] for event in found} >= {
        *("data", "step", "transfer", "forward", "backward", "optimizer", "evaluate", "score", "save"),
        *("layer", "attention", "mixing", "feed_forward", "head", "sample", "prefill", "decode", "denoise", "draw"),
    }
    for inner, outer in (("forward", "step"), ("layer", "forward"), ("mixing", "attention"), ("score", "evaluate")):
        begin, end = _extent(found, inner)
        assert any(a <= begin and end <= b for a, b in _extents(found, outer)), (inner, outer)
    said = [json.loads(line).get("text", "") for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert any("profile of steps 1 to 2: open " in text for text in said)
    if not torch.cuda.is_available():
        assert any("profiling.memory_history" in text for text in said)
    capsys.readouterr()


@pytest.mark.slow
def test_no_bit_depends_on_it_and_a_run_goes_on_with_another_window(tmp_path: Path, files: Path) -> None:
    for name, window in (("plain", []), ("profiled", ["profiling.start_step=2", "profiling.steps=1"])):
        assert train.main([*settings(tmp_path / name, files), *window]) == 0
    plain, profiled = tmp_path / "plain" / "r", tmp_path / "profiled" / "r"
    assert (profiled / "profile").exists() and not (plain / "profile").exists()
    weights = "checkpoints/latest/model.safetensors"
    assert (plain / weights).read_bytes() == (profiled / weights).read_bytes()
    more = ["--resume", "--new-horizon", "training.max_steps=4", "profiling.start_step=4", "profiling.steps=1"]
    assert train.main([*settings(tmp_path / "plain", files), *more]) == 0
    assert names(plain / "profile" / "step-00000004-rank-0.json").count("step") == 1


def _extents(found: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in found if event["name"] == name]


def _extent(found: list[dict[str, Any]], name: str) -> tuple[float, float]:
    return _extents(found, name)[0]


def test_settings_read_back(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*settings(tmp_path, files), "profiling.steps=3", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert tomli.loads(printed)["profiling"] == {
        "steps": 3,
        "start_step": 10,
        "level": "fine",
        "ranks": "first",
        "memory_history": 0,
    }
    (tmp_path / "printed.toml").write_text(printed)
    assert train.main(["--config", str(tmp_path / "printed.toml"), "--print-config", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["profiling"]["steps"] == 3
    assert train.main(["--explain", "profiling"]) == 0
    assert "Optimizer steps to record" in capsys.readouterr().out
