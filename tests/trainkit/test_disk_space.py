"""A disk that is too small is named before the first step, with numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainkit.checkpoints import CheckpointStore, Snapshot, model_tensors, save_checkpoint
from trainkit.disk_space import check_checkpoint_places, estimate_checkpoint_bytes
from trainkit.errors import UserError
from trainkit.optimizers import build_optimizer, optimizer_tensors
from trainkit.specs import AdamWSpec, CheckpointSpec


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


def test_the_estimate_is_what_a_checkpoint_takes(tmp_path: Path) -> None:
    model = nn.Linear(200, 300)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(AdamWSpec(), model)
    model(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    snapshot = Snapshot({"step": 1}, model_tensors(model), optimizer_tensors(optimizer, model), average)
    path = save_checkpoint(CheckpointStore(tmp_path, CheckpointSpec()), snapshot)
    real = sum(file.stat().st_size for file in path.iterdir())
    assert real == pytest.approx(estimate_checkpoint_bytes(model, average), rel=0.01)


def test_no_room_is_refused_little_room_is_told_and_old_checkpoints_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, size = CheckpointStore(tmp_path / "run" / "checkpoints", CheckpointSpec(keep_last=2)), 2**20
    with_free(monkeypatch, 2**20 - 1)
    with pytest.raises(UserError, match=r"takes about 1\.0 MiB, but .* has 1\.0 MiB left; free some space"):
        check_checkpoint_places(store, size)
    with_free(monkeypatch, 4 * 2**20 - 1)
    told = check_checkpoint_places(store, size)
    assert told is not None and "up to 4 checkpoints of about 1.0 MiB" in told and not store.root.exists()
    (store.root / "step-00000010").mkdir(parents=True)
    (store.root / "step-00000010" / "model.safetensors").write_bytes(b"x")
    assert check_checkpoint_places(store, size) is None
    with_free(monkeypatch, 4 * 2**20)
    assert check_checkpoint_places(CheckpointStore(tmp_path / "new", CheckpointSpec(keep_last=2)), size) is None
