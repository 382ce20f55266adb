"""Where a run begins: at its own checkpoint before all else, at another's, or at weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainkit.test_loop import ListLog, make_run, sha
from trainkit.beginnings import Beginning, choose_beginning, load_beginning, resolve_checkpoint
from trainkit.checkpoints import CheckpointStore, list_checkpoints, load_weights
from trainkit.errors import UserError
from trainkit.loop import Result, train
from trainkit.specs import CheckpointSpec


def store(root: Path, **spec: Any) -> CheckpointStore:
    return CheckpointStore(root, CheckpointSpec(**spec), report=lambda text: None)


def run_to_its_end(root: Path, **changes: Any) -> tuple[Result, ListLog]:
    """A run of 30 steps that saves every 7 of them, at the end and when it is the best so far."""
    log = ListLog()
    return train(make_run(root, log, **changes)), log


def start(root: Path, *, max_steps: int = 30, new_horizon: bool = False, **spec: Any) -> tuple[Beginning, Any]:
    place = store(root, **spec)
    beginning = choose_beginning(place)
    return beginning, load_beginning(beginning, place, max_steps=max_steps, new_horizon=new_horizon)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("other")
    run_to_its_end(folder / "checkpoints", training={"eval_every": 20})
    return folder


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/latest", "checkpoints/step-00000030"])
def test_a_checkpoint_has_several_names(other: Path, place: str) -> None:
    assert resolve_checkpoint(str(other / place), print).name == "step-00000030"


def test_the_links_are_not_trusted(other: Path, tmp_path: Path) -> None:
    assert (
        resolve_checkpoint(str(other / "checkpoints/best"), print).resolve() == (other / "checkpoints/best").resolve()
    )
    root = tmp_path / "checkpoints"
    run_to_its_end(root)
    for link in ("latest", "best"):
        (root / link).unlink()
        (root / link).symlink_to("step-00000028")
    assert resolve_checkpoint(str(root / "latest"), print).name == "step-00000030"
    (list_checkpoints(root)[-1] / "model.safetensors").write_bytes(b"")
    before, told = sorted(root.rglob("*")), list[str]()
    assert resolve_checkpoint(str(tmp_path), told.append).name == "step-00000028" and "damaged" in told[0]
    assert sorted(root.rglob("*")) == before
    for place in ("nowhere", "checkpoints/step-00000030"):
        with pytest.raises(UserError):
            resolve_checkpoint(str(tmp_path / place), print)


def test_a_new_run_goes_on_from_another_to_the_same_end(other: Path, tmp_path: Path) -> None:
    middle = next(path for path in list_checkpoints(other / "checkpoints") if path.name < "step-00000029")
    beginning, snapshot = start(tmp_path / "new", resume_from=str(middle))
    assert beginning.kind == "other run" and snapshot.trainer["best"] == {} and snapshot.trainer["log_offset"] == 0
    result = train(make_run(tmp_path / "new", ListLog(), training={"eval_every": 20}), resume=snapshot)
    assert result.step == 30 and sha(tmp_path / "new") == sha(other / "checkpoints")
    again, _ = start(tmp_path / "new", resume_from=str(middle))
    assert again.kind == "own"  # once it has a checkpoint of its own, that is what it goes on from


def test_the_optimizer_may_stay_behind(other: Path, tmp_path: Path) -> None:
    middle = list_checkpoints(other / "checkpoints")[0]
    _, snapshot = start(tmp_path / "new", resume_from=str(middle), resume_optimizer=False)
    assert snapshot.optimizer == {}
    result = train(make_run(tmp_path / "new", ListLog()), resume=snapshot)
    assert result.status == "finished" and sha(tmp_path / "new") != sha(other / "checkpoints")


def test_another_horizon_only_on_request(other: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is of a run over 30 steps, and training\.max_steps = 40 .*--new-horizon"):
        start(tmp_path / "new", max_steps=40, resume_from=str(other))
    _, snapshot = start(tmp_path / "new", max_steps=40, new_horizon=True, resume_from=str(other))
    result = train(make_run(tmp_path / "new", ListLog(), training={"max_steps": 40}), resume=snapshot)
    assert (result.status, result.step) == ("finished", 40)


def test_weights_alone_begin_a_run_of_its_own(other: Path, tmp_path: Path) -> None:
    beginning, snapshot = start(tmp_path / "new", max_steps=5, init_from=str(other))
    assert (beginning.kind, snapshot) == ("weights", None)
    for name, tensor in load_weights(beginning.path).items():
        assert torch.isfinite(tensor).all(), name
    with pytest.raises(UserError, match=r'checkpoint\.init_from = ".*nosuch" does not exist; train that run first'):
        start(tmp_path / "new", init_from=str(tmp_path / "nosuch"))
    with pytest.raises(ValueError, match="both resume_from and init_from"):
        CheckpointSpec(resume_from="a", init_from="b")
