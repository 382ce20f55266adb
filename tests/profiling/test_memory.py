"""The memory helpers say what there is; without a CUDA device they do nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from profiling import memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_nothing_happens(tmp_path: Path) -> None:
    assert memory.start_history(True) is False
    assert memory.dump_snapshot(tmp_path / "snapshot.json") is False
    assert not list(tmp_path.iterdir())
    assert memory.peaks() == {}
    memory.reset_peaks()
    assert "no CUDA" in memory.summary()


def test_as_the_documentation_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    memory.start_history(True)
    ok = memory.dump_snapshot("alloc_history.json")
    print(memory.summary())
    print(memory.peaks())
    memory.reset_peaks()
    memory.start_history(False)
    assert ok is torch.cuda.is_available() is Path("alloc_history.json").exists()
    assert capsys.readouterr().out.strip()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_peaks_rise_and_fall(tmp_path: Path) -> None:
    assert memory.start_history(True)
    memory.reset_peaks()
    before = memory.peaks()["allocated"]
    block = torch.zeros(1 << 22, device="cuda")
    assert memory.peaks()["allocated"] >= before + block.numel() * 4
    del block
    memory.reset_peaks()
    assert memory.peaks()["allocated"] <= before + 1024
    assert memory.dump_snapshot(tmp_path / "snapshot.json") and json.loads((tmp_path / "snapshot.json").read_text())
    assert memory.dump_snapshot(tmp_path / "snapshot.pickle") and (tmp_path / "snapshot.pickle").stat().st_size
    assert memory.start_history(False)
    assert "allocated" in memory.summary().lower()
