"""Checkpoints: what is written is what is read, damage is found, retention never leaves nothing."""

from __future__ import annotations

import json
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import checkpoints
from trainkit.checkpoints import (
    CheckpointStore,
    Snapshot,
    find_newest_intact,
    list_checkpoints,
    load_model_tensors,
    load_snapshot,
    load_weights,
    model_tensors,
    non_finite_tensors,
    save_checkpoint,
)
from trainkit.errors import UserError
from trainkit.specs import CheckpointSpec


def store(root: Path, messages: list[str] | None = None, **spec: int) -> CheckpointStore:
    report = (messages if messages is not None else []).append
    return CheckpointStore(root, CheckpointSpec(**spec), write_assets=write_assets, report=report)


def write_assets(directory: Path) -> None:
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.json").write_text("{}")


def snapshot(step: int, best: int | None = None) -> Snapshot:
    torch.manual_seed(step)
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.randn(5)}
    return Snapshot(
        trainer={"step": step, "best": {"step": best, "value": 0.5} if best else {}, "x": 0.1 + 0.2},
        model=tensors,
        optimizer={f"{name}/exp_avg": t * 2 for name, t in tensors.items()} | {"b/step": torch.tensor(3.0)},
        average={name: t / 3 for name, t in tensors.items()},
    )


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = save_checkpoint(store(tmp_path), snapshot(420))
    assert path.name == "step-00000420"
    found, wanted = load_snapshot(path), snapshot(420)
    assert found.trainer == wanted.trainer | {"format": 2}
    for part in ("model", "optimizer", "average"):
        a, b = getattr(found, part), getattr(wanted, part)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (path / "tokenizer" / "vocab.json").exists()
    assert (tmp_path / "latest").readlink() == Path("step-00000420")


def test_retention_keeps_the_newest_the_best_and_every_nth(tmp_path: Path) -> None:
    place = store(tmp_path, keep_last=2, keep_every=40)
    for step in range(10, 101, 10):
        save_checkpoint(place, snapshot(step, best=30 if step >= 30 else None))
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [30, 40, 80, 90, 100]
    assert (tmp_path / "best").readlink() == Path("step-00000030")
    assert not list(tmp_path.glob(".*"))


def test_the_best_stays_when_a_better_one_could_not_be_written(tmp_path: Path) -> None:
    place = store(tmp_path, keep_last=1)
    save_checkpoint(place, snapshot(1, best=1))
    for step in (3, 4):  # step 2 was better, and the disk was full
        save_checkpoint(place, snapshot(step, best=2))
        assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [1, step]
    save_checkpoint(place, snapshot(5, best=5))
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [5]


def test_the_newest_intact_one_is_found_past_damage(tmp_path: Path) -> None:
    messages: list[str] = []
    place = store(tmp_path, messages, keep_last=5)
    assert find_newest_intact(place) is None
    for step in (1, 2, 3):
        save_checkpoint(place, snapshot(step))
    (tmp_path / "step-00000003" / "trainer.json").unlink()
    (tmp_path / "step-00000002" / "manifest.json").write_text("")
    found = find_newest_intact(place)
    assert found is not None and found.name == "step-00000001"
    assert "trainer.json" in messages[0] and "manifest.json" in messages[1]


def damaged(content: bytes, draw: random.Random) -> bytes | None:
    """Other content, or `None` for a file that is gone."""
    at = draw.randrange(len(content))
    match draw.choice(["flip", "flip", "overwrite", "cut", "append", "empty", "delete"]):
        case "flip":
            return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
        case "overwrite":
            return content[:at] + draw.randbytes(draw.randint(1, 64)) + content[at + 64 :]
        case "cut":
            return content[:at]
        case "append":
            return content + draw.randbytes(draw.randint(1, 8))
        case "empty":
            return b""
        case _:
            return None


def test_a_thousand_corruptions_are_detected_and_the_one_before_is_used(tmp_path: Path) -> None:
    """Anywhere in any file, the manifest included: never loaded silently, and named."""
    draw, messages = random.Random(1), list[str]()
    place = store(tmp_path, messages)
    before, newest = save_checkpoint(place, snapshot(6)), save_checkpoint(place, snapshot(7))
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    assert len(files) == 7
    for number in range(1000):
        file = draw.choice(files)
        content = file.read_bytes()
        while (damage := damaged(content, draw)) == content:
            pass
        file.unlink() if damage is None else file.write_bytes(damage)
        messages.clear()
        assert find_newest_intact(place) == before, (number, file)
        assert len(messages) == 1 and str(newest) in messages[0]
        file.write_bytes(content)
    assert find_newest_intact(place) == newest


def test_a_format_that_is_not_ours_is_one_sentence(tmp_path: Path) -> None:
    path = save_checkpoint(store(tmp_path), snapshot(3))
    (path / "trainer.json").write_text('{"format": 1, "step": 3}')
    with pytest.raises(UserError, match=r"format 1 and this version resumes from format 2: go on with"):
        load_snapshot(path)


@pytest.mark.parametrize("load", [load_snapshot, load_weights])
def test_a_checkpoint_that_its_run_prunes_meanwhile_is_one_sentence(tmp_path: Path, load: Any) -> None:
    path = save_checkpoint(store(tmp_path), snapshot(3))
    shutil.rmtree(path)
    with pytest.raises(UserError, match="step-00000003 is gone: its run has pruned it"):
        load(path)


def test_a_large_optimizer_is_cut_between_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 1000)
    names = [f"layer.{i}.weight" for i in range(9)]
    state = {f"{name}/{key}": torch.randn(10, 6) for name in names for key in ("exp_avg", "exp_avg_sq")}
    path = save_checkpoint(store(tmp_path), Snapshot({"step": 1}, {"a": torch.zeros(1)}, state))
    index = json.loads((path / "optimizer.index.json").read_text())
    assert set(index.values()) == {f"optimizer-{i:05d}.safetensors" for i in range(5)}
    assert all(index[f"{name}/exp_avg"] == index[f"{name}/exp_avg_sq"] for name in names)
    found = load_snapshot(path).optimizer
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_numbers_that_are_not_finite_are_found_in_any_part() -> None:
    whole = snapshot(1)
    assert non_finite_tensors(whole) == []
    whole.model["b"][3] = torch.inf
    whole.optimizer["a.weight/exp_avg"][2, 1] = torch.nan
    whole.average["large"] = torch.full((8,), 3e38)  # whose sum would overflow
    assert non_finite_tensors(whole) == ["model/b", "optimizer/a.weight/exp_avg"]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(model_tensors(model)) == ["0.weight"]
    path = save_checkpoint(store(tmp_path), Snapshot({"step": 1, "best": {}}, model_tensors(model)))
    before = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    load_model_tensors(model, load_snapshot(path).model, "x")
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"weight": torch.zeros(2, 3)}, "bias is missing"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, "more is unknown"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "weight has shape"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tensors: dict[str, torch.Tensor], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_model_tensors(nn.Linear(3, 2), tensors, "runs/x")


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    """Also where the tensors are written, by a library that has an exception of its own."""
    place = store(tmp_path)
    before = save_checkpoint(place, snapshot(1))
    large = Snapshot({"step": 2, "best": {}}, {"a": torch.zeros(5_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*step-00000002: .*File too large.*free some space"):
            save_checkpoint(place, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert find_newest_intact(place) == before


@pytest.mark.parametrize("damage", ["manifest.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_to_its_step_again(tmp_path: Path, damage: str) -> None:
    place = store(tmp_path)
    path = save_checkpoint(place, snapshot(2))
    (path / damage).write_text("{")
    assert save_checkpoint(place, snapshot(2)) == path == find_newest_intact(place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002"]
