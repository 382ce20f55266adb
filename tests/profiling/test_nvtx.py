"""Ranges: nothing when off, the right ones when on, and never a break in a compiled graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from profiling import nvtx
from profiling.specs import Level
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec
from transformerlm.models.transformer import Transformer

SwitchOn = Callable[[Level], list[str]]


@pytest.fixture
def switch_on(monkeypatch: pytest.MonkeyPatch) -> SwitchOn:
    """Switches ranges on as the environment would, and gives the list that fills with their names."""
    names: list[str] = []

    @contextmanager
    def record(name: str, domain: str) -> Iterator[None]:
        assert domain == "transformerlm"
        names.append(name)
        yield

    def switch(level: Level) -> list[str]:
        monkeypatch.setattr("nvtx.annotate", record)
        monkeypatch.setattr(nvtx, "_nvtx", nvtx._RANK[level])
        monkeypatch.setattr(nvtx, "_enabled", nvtx._RANK[level])
        names.clear()
        return names

    return switch


def test_off_there_is_one_shared_object() -> None:
    assert nvtx.range("a") is nvtx.range("b", "verbose")
    with nvtx.range("a"), nvtx.range("a"):
        pass


def test_off_nothing_is_imported() -> None:
    code = "import sys; from profiling import nvtx; nvtx.range('a').__enter__(); print('nvtx' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERLM_NVTX")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("coarse", []),
        ("fine", ["attention", "feed_forward", "head"]),
        ("verbose", ["layer", "attention", "mixing", "feed_forward", "head"]),
    ],
)
def test_each_level_has_its_ranges(switch_on: SwitchOn, level: Level, expected: list[str]) -> None:
    names = switch_on(level)
    model, tokens = _model()
    model(tokens)
    assert names == expected


def test_one_graph_serves_whatever_is_on(switch_on: SwitchOn) -> None:
    model, tokens = _model()
    expected = model(tokens)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert compiled(tokens).equal(expected)
    names = switch_on("verbose")
    assert compiled(tokens).equal(expected)
    with nvtx.traced("verbose"):
        assert compiled(tokens).equal(expected)
    assert counter.frame_count == 1 and names == []

    torch._dynamo.reset()
    assert torch.compile(model, fullgraph=True, backend=counter)(tokens).equal(expected)  # traced while they are on
    assert counter.frame_count == 2 and names == []


def test_inside_traced_ranges_are_events_of_the_profiler_too(switch_on: SwitchOn) -> None:
    names = switch_on("coarse")
    with torch.autograd.profiler.profile() as profile:
        with (
            nvtx.range("before"),
            nvtx.traced("fine"),
            nvtx.range("phase"),
            nvtx.range("part", "fine"),
            nvtx.range("detail", "verbose"),
        ):
            pass
        with nvtx.range("after"):
            pass
    events = [event.name for event in profile.function_events or []]
    assert events == ["phase", "part"] and names == ["before", "phase", "after"]


@pytest.mark.parametrize(
    ("variables", "rank"),
    [({}, 0), ({"": "0"}, 0), ({"": "1"}, 1), ({"": "1", "_LEVEL": "fine"}, 2), ({"": "1", "_LEVEL": "verbose"}, 3)],
)
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: int) -> None:
    for suffix in ("", "_LEVEL"):
        monkeypatch.delenv(f"TRANSFORMERLM_NVTX{suffix}", raising=False)
    for suffix, value in variables.items():
        monkeypatch.setenv(f"TRANSFORMERLM_NVTX{suffix}", value)
    assert nvtx._rank_of_environment() == rank


def test_an_unknown_level_is_one_sentence() -> None:
    environment = os.environ | {"TRANSFORMERLM_NVTX": "1", "TRANSFORMERLM_NVTX_LEVEL": "loud"}
    command = [sys.executable, "-c", "import profiling.nvtx"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "coarse, fine, verbose" in result.stderr and "Traceback" not in result.stderr


def _model() -> tuple[Transformer, Tensor]:
    model = create_model(TransformerSpec(num_layers=1, d_model=32, num_heads=2), vocab_size=10)
    return model.eval(), torch.zeros(1, 4, dtype=torch.int64)
