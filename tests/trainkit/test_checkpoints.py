"""Checkpoints: what is written is what is read, damage is found, retention never leaves nothing."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from trainkit.checkpoints import (
    CheckpointStore,
    Snapshot,
    find_newest_intact,
    list_checkpoints,
    load_model_tensors,
    load_snapshot,
    model_tensors,
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
    assert found.trainer | {"format": 1} == wanted.trainer | {"format": 1}
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


def test_random_corruption_is_always_detected(tmp_path: Path) -> None:
    """Flip, cut or delete anywhere in any file: never loaded silently."""
    draw = random.Random(1)
    messages: list[str] = []
    place = store(tmp_path, messages)
    path = save_checkpoint(place, snapshot(7))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for _ in range(150):
        file = draw.choice(files)
        content = file.read_bytes()
        at = draw.randrange(len(content))
        match draw.choice(["flip", "cut", "delete"]):
            case "flip":
                file.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
            case "cut":
                file.write_bytes(content[:at])
            case _:
                file.unlink()
        found = find_newest_intact(place)
        # A flip inside the manifest may leave it meaning the same (a space turned into another); all else is refused.
        assert found is None or (file.name == "manifest.json" and load_snapshot(found).trainer["step"] == 7)
        file.write_bytes(content)
        assert find_newest_intact(place) == path


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
