"""`transformerlm-replay`: a past step again, from whatever checkpoint there is, and nothing of the run touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from cli import replay as command
from cli import train
from cli.token_files import build_token_files
from config.corpora import GrammarCorpusSpec
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE
from transformerlm.corpus.stories import sample, split_seed
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.trainer import train_tokenizer

TINY = ("model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.context_length=32")
SIZES = ("training.total_batch_size=256", "training.device_batch_size=4", "training.max_steps=6")
KEPT = ("training.save_every=2", "checkpoint.keep_last=9", "logging.plots=false", "inference.prompts=[]")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tokenizer = train_tokenizer([sample(0, index) for index in range(30)], TokenizerTrainingSpec(vocab_size=300))
    tokenizer.save(folder / "tokenizer")
    build_token_files(GrammarCorpusSpec(num_train_stories=8), "train", tokenizer, folder / "train", workers=1)
    return folder


def trained(folder: Path, files: Path, *more: str) -> Path:
    paths = [f"run.dir={folder}", "run.name=r", f"tokenizer.path={files / 'tokenizer'}"]
    data = [f"data.megatron_train_prefix={files / 'train'}", "data.megatron_val_prefix="]
    device = ["training.device=cpu", "training.threads=1", "training.log_every=1"]
    assert train.main([*TINY, *SIZES, *KEPT, *paths, *data, *device, *more]) == 0
    return folder / "r"


@pytest.fixture(scope="module")
def run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), files)


def content(run: Path) -> dict[str, str]:
    paths = [path for path in sorted(run.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns) for path in paths}


def replayed(run: Path, step: int, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> dict[str, Any]:
    before = content(run)
    assert command.main(["--run", str(run), "--step", str(step), "--json", *more]) == code
    assert content(run) == before
    return json.loads(capsys.readouterr().out)


def recorded(run: Path, step: int, name: str = "loss") -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(record[name] for record in records if record["kind"] == "train" and record["step"] == step)


def test_a_step_is_the_same_from_every_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint right before it, from an older one, from none; damaged ones are passed over."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    near = replayed(copy, 5, capsys)
    assert near["matches"] is True and "step-00000004" in near["beginning"]
    assert near["metrics"]["loss"]["hex"] == recorded(run, 5).hex()
    assert near["metrics"]["gradient_norm"]["hex"] == recorded(run, 5, "gradient_norm").hex()
    (copy / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"damaged")
    far = replayed(copy, 5, capsys)
    assert "step-00000002" in far["beginning"] and "step-00000004" in far["notes"][0]
    shutil.rmtree(copy / "checkpoints")
    first = replayed(copy, 5, capsys)
    assert first["beginning"] == "starting from the first step"
    for name in ("gradients", "samples", "rows", "position", "metrics", "matches"):
        assert near[name] == far[name] == first[name]
    assert [check["step"] for check in first["verified"][::2]] == [1, 2, 3, 4, 5]


def test_every_step_of_the_run_matches(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [replayed(run, step, capsys) for step in (1, 2, 3, 6)]
    assert all(report["matches"] for report in found)
    assert [report["samples"] for report in found[:2]] == [list(range(8)), list(range(8, 16))]


def test_gradients_are_those_of_the_loss(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = replayed(run, 3, capsys, "--save", str(tmp_path / "g.safetensors"))
    gradients = safetensors.torch.load_file(tmp_path / "g.safetensors")
    total = sum(float(tensor.double().square().sum()) for tensor in gradients.values()) ** 0.5
    assert total == pytest.approx(recorded(run, 3, "gradient_norm"))
    for name, told in report["gradients"].items():
        tensor = gradients[name]
        assert told["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert told["norm"] == pytest.approx(float(tensor.norm()), rel=1e-5)


def test_the_batch_is_text_of_the_data(run: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = "".join(sample(split_seed(0, "train"), index) for index in range(8))
    report = replayed(run, 1, capsys, "--rows", "2")
    assert len(report["rows"]) == 2 and len(report["samples"]) == 8
    assert all(part in stories for row in report["rows"] for part in row["text"].split("<|endoftext|>"))
    assert report["position"][0]["next_sample"] == 8
    assert command.main(["--run", str(run), "--step", "1"]) == 0
    assert "matches the run to the bit" in capsys.readouterr().out.splitlines()[-1]


def test_noise_accumulation_and_intervals_are_replayed(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A diffusion run that records every third step: the checkpoint's open sums belong to the comparison."""
    more = ["training.objective=diffusion", "training.log_every=3", "training.ema_decay=0.5", "optimizer.kind=muon"]
    run = trained(tmp_path, files, *more)
    capsys.readouterr()
    assert [check["step"] for check in replayed(run, 6, capsys)["verified"]] == [6, 6]
    unrecorded = replayed(run, 5, capsys)
    assert "smaller training.log_every" in command.verdict(unrecorded)
    assert unrecorded["matches"] is None and unrecorded["gradients"]


def test_another_past_is_noticed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    path = copy / "metrics.jsonl"
    path.write_text(path.read_text().replace(str(recorded(run, 5)), str(recorded(run, 5) * (1 + 2**-50))))
    report = replayed(copy, 5, capsys, code=EXIT_FAILURE)
    assert report["matches"] is False
    assert command.main(["--run", str(copy), "--step", "5"]) == EXIT_FAILURE
    assert "does NOT match the run: loss of step 5" in capsys.readouterr().out


def test_what_cannot_be_replayed_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model": {}}')
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    config = json.loads((other / "config.json").read_text())
    config["inputs"]["train"] = "another"
    (other / "config.json").write_text(json.dumps(config))
    for path, step, code, message in (
        (tmp_path / "none", 1, EXIT_FAILURE, "holds no run"),
        (broken, 1, EXIT_FAILURE, "cannot be read as the settings of this version (tokenizer)"),
        (run, 7, EXIT_USAGE, "has 6 steps"),
        (run, 0, EXIT_USAGE, "replay.step"),
        (other, 1, EXIT_FAILURE, "no longer those that the run"),
    ):
        assert command.main(["--run", str(path), "--step", str(step)]) == code
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and message in output.err, output.err


@pytest.mark.slow
def test_ranks_are_replayed_by_ranks_and_in_tree_mode_by_one(
    tmp_path: Path, files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Batches of both ranks in their order; the gradient is the step's, whoever computes it."""
    ranks = ["distributed.processes=2", "distributed.reduction=tree", "training.device_batch_size=2"]
    run = trained(tmp_path, files, *ranks)
    capfd.readouterr()
    both, alone = replayed(run, 4, capfd), replayed(run, 4, capfd, "replay.processes=1")
    assert both["matches"] and alone["matches"] and both["samples"] == list(range(24, 32))
    for name in ("samples", "rows", "metrics", "gradients"):
        assert both[name] == alone[name]


def test_a_stream_is_replayed_from_its_position(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(sample(0, index) + "\n" for index in range(40)))
    packed = [
        "data.pipeline_mode=packed",
        f"data.dataset_name={tmp_path / 'text.txt'}",
        "data.lanes=4",
        "data.val_split=",
    ]
    paths = [f"run.dir={tmp_path}", "run.name=r", f"tokenizer.path={files / 'tokenizer'}", "training.log_every=1"]
    device = ["training.device=cpu", "training.threads=1"]
    assert train.main([*TINY, *SIZES, *KEPT, *paths, *packed, *device, "--config-name", "train_packed"]) == 0
    capsys.readouterr()
    report = replayed(tmp_path / "r", 4, capsys)
    assert report["matches"] and "step-00000002" in report["beginning"] and report["rows"]
