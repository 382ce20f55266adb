"""Ranges: nothing when off, the right ones when on, and never a break in a compiled graph."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from profiling import nvtx
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec


def test_off_there_is_one_shared_object() -> None:
    assert nvtx.range("a") is nvtx.range("b", "verbose")
    with nvtx.range("a"), nvtx.range("a"):
        pass


def test_off_nothing_is_imported() -> None:
    code = (
        "import sys; from profiling import nvtx; nvtx.range('a').__enter__(); print({'nvtx', 'torch'} & {*sys.modules})"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERLM_NVTX")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_levels_choose_the_ranges_and_compiled_graphs_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    @contextmanager
    def record(name: str, domain: str) -> Iterator[None]:
        names.append(f"{domain}/{name}")
        yield

    monkeypatch.setattr("nvtx.annotate", record)
    monkeypatch.setattr(nvtx, "_enabled", 2)
    with nvtx.range("phase"), nvtx.range("part", "fine"), nvtx.range("detail", "verbose"):
        pass
    assert names == ["transformerlm/phase", "transformerlm/part"]

    model = create_model(TransformerSpec(num_layers=1, d_model=32, num_heads=2), vocab_size=10)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    expected = model(tokens)
    assert [name.split("/")[1] for name in names[2:]] == ["attention", "feed_forward", "head"]
    monkeypatch.setattr(nvtx, "_enabled", 3)
    model(tokens)
    assert [name.split("/")[1] for name in names[5:]] == ["attention", "mixing", "feed_forward", "head"]
    torch._dynamo.reset()
    assert torch.compile(model, fullgraph=True, backend="eager")(tokens).equal(expected)
    assert len(names) == 9


@pytest.mark.parametrize(
    ("variables", "rank"),
    [({}, 0), ({"": "0"}, 0), ({"": "1"}, 1), ({"": "1", "_LEVEL": "fine"}, 2), ({"": "1", "_LEVEL": "verbose"}, 3)],
)
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: int) -> None:
    for suffix in ("", "_LEVEL"):
        monkeypatch.delenv(f"TRANSFORMERLM_NVTX{suffix}", raising=False)
    for suffix, value in variables.items():
        monkeypatch.setenv(f"TRANSFORMERLM_NVTX{suffix}", value)
    assert nvtx._enabled_rank() == rank


def test_an_unknown_level_is_one_sentence() -> None:
    environment = os.environ | {"TRANSFORMERLM_NVTX": "1", "TRANSFORMERLM_NVTX_LEVEL": "loud"}
    command = [sys.executable, "-c", "import profiling.nvtx"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "coarse, fine, verbose" in result.stderr and "Traceback" not in result.stderr
