"""Which checkpoint a path means, and that a loaded model is the one that was saved, or one sentence why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transformerlm
from tests.models.checkpoints import SPEC, model, tokenizer, write_checkpoint
from trainkit.artifacts import seal_directory
from trainkit.errors import UserError
from transformerlm.models import files
from transformerlm.models.files import load_checkpoint, load_model, model_json, resolve_checkpoint


def test_a_loaded_model_is_the_saved_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, ema=True)
    tokens = torch.arange(20).reshape(2, 10)
    loaded = load_checkpoint(path)
    assert loaded.model(tokens).equal(model(3)(tokens))
    assert loaded.tokenizer.content_hash == tokenizer().content_hash
    assert loaded.path == path and not loaded.model.training
    assert load_model(path, weights="ema")(tokens).equal(model(1003)(tokens))


def test_the_description_says_what_a_reader_must_know() -> None:
    description = model_json(SPEC, vocab_size=280)
    assert description | {"spec": None} == {
        "kind": "transformer",
        "modes": ["ar"],
        "alignment": "shifted",
        "block_size": 0,
        "vocab_size": 280,
        "padded_vocab_size": 384,
        "spec": None,
    }
    assert json.loads(json.dumps(description["spec"]))["context_length"] == SPEC.context_length


def test_paths_mean_a_step_the_best_or_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = {step: write_checkpoint(run, step, best=best) for step, best in ((5, 5), (10, 10), (15, 10), (100, 10))}
    (run / "checkpoints" / "step-00000999").mkdir()  # unfinished: no manifest
    (run / "checkpoints" / "latest").symlink_to("step-00000005")  # stale
    root = run / "checkpoints"
    assert resolve_checkpoint(steps[5]) == steps[5]
    assert resolve_checkpoint(run) == resolve_checkpoint(root) == resolve_checkpoint(root / "best") == steps[10]
    assert resolve_checkpoint(str(root / "latest")) == steps[100]


def test_without_validation_a_run_means_its_newest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 7)
    assert resolve_checkpoint(tmp_path) == newest
    with pytest.raises(UserError, match="no best checkpoint; try the run folder"):
        resolve_checkpoint(tmp_path / "checkpoints" / "best")


def test_paths_that_mean_nothing_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no intact checkpoint"):
        resolve_checkpoint(tmp_path)


def damage(step: Path, name: str = "model.safetensors") -> None:
    """Flip one bit."""
    data = bytearray((step / name).read_bytes())
    data[-5] ^= 1
    (step / name).write_bytes(data)


def test_a_damaged_step_folder_that_is_named_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    path = write_checkpoint(tmp_path, 2)
    damage(path)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(path)


@pytest.mark.parametrize(
    ("damaged", "place", "used", "named"),
    [
        ([15], ".", 10, [15]),
        ([15], "checkpoints/latest", 10, [15]),
        ([10], "checkpoints", 15, [10]),
        ([10], "checkpoints/best", 15, [10]),
        ([10], "checkpoints/latest", 15, []),
        ([10, 15], "checkpoints/best", 5, [15, 10]),
        ([5], ".", 10, []),
    ],
)
def test_a_damaged_checkpoint_of_a_run_is_named_and_the_newest_intact_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: list[int], place: str, used: int, named: list[int]
) -> None:
    """Of three checkpoints, of which the second is the best."""
    steps = {step: write_checkpoint(tmp_path, step, best=min(step, 10)) for step in (5, 10, 15)}
    for step in damaged:
        damage(steps[step])
    assert load_checkpoint(tmp_path / place).path == steps[used]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(named)
    for record, step in zip(caplog.records, named, strict=True):
        assert f"{steps[step]} is damaged: " in record.getMessage()


def test_a_run_without_an_intact_checkpoint_is_refused(tmp_path: Path) -> None:
    damage(write_checkpoint(tmp_path, 1))
    for path in (tmp_path, tmp_path / "checkpoints" / "latest", tmp_path / "checkpoints" / "best"):
        with pytest.raises(UserError, match="no intact checkpoint"):
            load_model(path)


def test_a_checkpoint_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[Path] = []
    monkeypatch.setattr(files, "verify_directory", verified.append)
    old, newest = write_checkpoint(tmp_path, 5), write_checkpoint(tmp_path, 7, best=7)
    for path, hashed in ((old, [old]), (tmp_path, [newest]), (tmp_path / "checkpoints" / "best", [newest])):
        verified.clear()
        load_model(path)
        assert verified == hashed


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its tokenizer has 280 ids, its model 300"):
        load_model(write_checkpoint(tmp_path, 1, vocab_size=300))


def test_weights_that_do_not_fit_the_description_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    description = model_json(SPEC, vocab_size=280)
    description["spec"]["d_ff"] = 64
    (path / "model.json").write_text(json.dumps(description))
    seal_directory(path)
    with pytest.raises(UserError, match=r"does not fit model\.json .*feed_forward"):
        load_model(path)


@pytest.mark.parametrize("change", [{"kind": "mystery"}, {"alignment": "straight"}, {"spec": {"unknown": 1}}])
def test_a_description_of_another_version_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = write_checkpoint(tmp_path, 1)
    (path / "model.json").write_text(json.dumps(model_json(SPEC, vocab_size=280) | change))
    seal_directory(path)
    with pytest.raises(UserError, match="cannot be understood"):
        load_model(path)


def test_an_average_that_the_run_did_not_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kept no average"):
        load_model(write_checkpoint(tmp_path, 1), weights="ema")


def test_the_context_can_be_stretched_on_loading(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    changes = {"context_length": 96, "rope_scaling": "ntk", "rope_scaling_factor": 2.0}
    longer = load_model(path, changes=changes)
    assert longer(torch.zeros(1, 96, dtype=torch.int64)).shape == (1, 96, 280)
    with pytest.raises(UserError, match="cannot be changed"):
        load_model(path, changes={"no_such_field": 1})
    with pytest.raises(UserError, match="does not fit"):
        load_model(path, changes={"num_layers": 3})


def test_the_package_offers_its_names_and_loads_nothing_before_they_are_used() -> None:
    script = "import sys, transformerlm; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert transformerlm.load_model is load_model
    assert all(callable(getattr(transformerlm, name)) for name in transformerlm.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = transformerlm.nothing
