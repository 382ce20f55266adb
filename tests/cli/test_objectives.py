"""Diffusion and dual runs from their shipped configurations, small: trained, resumed, evaluated, sampled, compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import compare_objectives
from cli.pipeline import main as pipeline
from config.loading import load, shipped
from config.schemas import PipelineConfig
from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.inference.predictor import Predictor
from transformerlm.models.files import read_model_json, resolve_checkpoint

SMALL = (
    "corpus.num_train_stories=120", "corpus.num_val_stories=4", "tokenizer.vocab_size=400", "model.context_length=64",
    "model.num_layers=1", "model.d_model=32", "model.num_heads=2", "training.total_batch_size=256",
    "training.device_batch_size=2", "training.max_steps=12", "training.eval_every=6", "training.save_every=5",
    "training.sample_every=0", "training.log_every=1", "training.precision=fp32", "training.threads=1",
    "evaluation.draws=2", "schedule.warmup_steps=2", "logging.plots=false", "inference.tokens_per_step=4",
)  # fmt: skip


def run(folder: Path, name: str, *more: str) -> int:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return pipeline(["--config-name", name, *SMALL, *more])
    finally:
        os.chdir(before)


def records(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    assert run(folder, "quickstart") == 0
    assert run(folder, "quickstart_diffusion") == 0
    assert run(folder, "quickstart_dual") == 0
    return folder


@pytest.mark.slow
def test_the_checkpoint_says_how_it_is_read(runs: Path) -> None:
    _, diffusion, _ = read_model_json(resolve_checkpoint(runs / "runs/quickstart_diffusion"))
    _, dual, _ = read_model_json(resolve_checkpoint(runs / "runs/quickstart_dual"))
    assert (diffusion.modes, diffusion.alignment) == (("diffusion",), "shifted")
    assert (dual.modes, dual.alignment) == (("ar", "diffusion"), "shifted")


MISSED = 'checkpoint.init_from = "runs/quickstart" does not exist; train that run first'


def test_the_run_that_one_begins_with_is_missed_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "quickstart_diffusion") == 1
    assert MISSED in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_finished_run_does_not_miss_it_but_one_made_again_does_before_it_is_set_aside(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("artifacts", "runs/quickstart_diffusion"):
        shutil.copytree(runs / part, tmp_path / part, symlinks=True)
    assert run(tmp_path, "quickstart_diffusion") == 0
    assert run(tmp_path, "quickstart_diffusion", "--force") == 1
    assert MISSED in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quickstart_diffusion"]


def test_a_run_with_a_remote_home_may_go_on_from_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only its checkpoints are missing on a new machine, which is found out when training begins."""
    assert run(tmp_path, "quickstart_diffusion", f"checkpoint.remote=file://{tmp_path}/far") == 1
    assert MISSED in capsys.readouterr().err
    assert (tmp_path / "artifacts").exists()


@pytest.mark.slow
def test_the_log_tells_about_masks_and_both_halves(runs: Path) -> None:
    told = records(runs, "quickstart_diffusion", "train")
    assert all(0.2 < record["mask_fraction"] < 0.5 for record in told)  # a third on the average: p = t²
    assert {"masked_loss/0.00-0.25", "masked_loss/0.75-1.00"} <= set().union(*told)
    dual = records(runs, "quickstart_dual", "train")[-1]
    assert dual["loss"] == pytest.approx(0.5 * dual["ar/loss"] + 0.5 * dual["diffusion/loss"], rel=1e-4)
    modes = {record["mode"] for record in records(runs, "quickstart_dual", "sample")}
    assert modes == {"ar", "diffusion"}


@pytest.mark.slow
def test_both_ways_of_a_dual_model_write_and_are_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictor = Predictor.from_checkpoint(runs / "runs/quickstart_dual", device="cpu")
    assert predictor.generate("Once", mode="ar", total_length=30) != predictor.generate(
        "Once", mode="diffusion", total_length=30
    )
    page = runs / "page.md"
    page.write_text(f"before\n{compare_objectives.BEGIN}\nold\n{compare_objectives.END}\nafter\n")
    paths = [str(runs / "runs" / name) for name in ("quickstart_diffusion", "quickstart_dual")]
    assert compare_objectives.main([*paths, "--stories", "3", "--draws", "2", "--write", str(page)]) == 0
    told = capsys.readouterr()
    assert "quickstart_dual: next tokens, 3 stories" in told.err
    rows = json.loads(told.out.splitlines()[-1])
    assert [row["method"] for row in rows] == ["bound", "left_to_right", "ar", "bound", "left_to_right"]
    # Models of a minute know nothing yet; a mean below the grammar's would be a bug in one of the two likelihoods.
    assert all(row["grammar"]["excess_nats"] > -3 * row["grammar"]["standard_error"] for row in rows)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| `quickstart_dual` |") == 3


@pytest.mark.slow
def test_steps_may_grow_while_both_objectives_train(tmp_path: Path) -> None:
    """Shorter windows are masked as such, and α follows the steps, not the samples."""
    growing = ["training.context_length_divisors=[[0,2],[4,1]]", "training.batch_size_factors=[[2,2]]"]
    weights = ["objective.ar_weight=1", "objective.final_ar_weight=0"]
    assert run(tmp_path, "quickstart_dual", *growing, *weights, "training.max_steps=6", "inference.prompts=[]") == 0
    told = records(tmp_path, "quickstart_dual", "train")
    assert [record["ar_weight"] for record in told] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert all(0.4 < record["diffusion/mask_fraction"] < 0.6 for record in told)


@pytest.mark.slow
def test_a_stopped_diffusion_run_goes_on_as_if_it_had_not_been(runs: Path, tmp_path: Path) -> None:
    """The noise is a function of seed and sample: stopped at step 5 and resumed, every loss is the same to the bit."""
    shutil.copytree(runs / "runs/quickstart", tmp_path / "runs/quickstart", symlinks=True)
    script = f"""
import os, signal, sys
from cli.pipeline import main
import trainkit.logging.run_log as run_log
original = run_log.FileLog.write
def stopping(self, record):
    original(self, record)
    if record.get("kind") == "train" and record["step"] == 5:
        os.kill(os.getpid(), signal.SIGTERM)
run_log.FileLog.write = stopping
sys.exit(main({["--config-name", "quickstart_diffusion", *SMALL]!r}))
"""
    stopped = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=False)
    assert stopped.returncode == 75, stopped.stderr.decode()
    assert run(tmp_path, "quickstart_diffusion") == 0
    losses = [
        [record["loss"] for record in records(folder, "quickstart_diffusion", "train")] for folder in (runs, tmp_path)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objective.alignment=in_place", "objective.block_size=300"], "block_size .300. must be at most"),
        (["objective.schedule=clipped", "objective.mask_low=0.9"], "mask_low .0.9. must be below mask_high"),
        (["objective.block_size=4", "objective.alignment=shifted"], "block_size needs alignment"),
        (["inference.cache=dual"], "set block_length"),
        (["inference.steps=0"], "inference.steps"),
        (["objective.ar_weight=0.5"], "ar_weight"),
        (["training.context_length_divisors=[[0,3]]"], "has 3, which does not divide model.context_length"),
    ],
)
def test_bad_diffusion_settings_are_one_sentence(changes: list[str], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message) as error:
        load(PipelineConfig, shipped("quickstart_diffusion"), changes)
    if isinstance(error.value, UserError):
        assert error.value.exit_code == EXIT_USAGE
