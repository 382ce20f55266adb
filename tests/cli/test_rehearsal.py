"""The trial before the data are opened, and the settings of memory: what changes is memory alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cli.rehearsal
import cli.training
from cli import diff_runs, train
from cli.rehearsal import made_up_batch, rehearsed
from cli.token_files import build_token_files
from config.corpora import GrammarCorpusSpec
from config.loading import load, shipped
from config.schemas import TrainConfig
from tests.trainkit.ranks import alone
from trainkit.distribution import World
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE
from trainkit.rehearsal import Rehearsal
from transformerlm.corpus.stories import sample
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

TINY = ("model.num_layers=2", "model.d_model=16", "model.num_heads=2", "model.context_length=32")
SIZES = (
    "training.total_batch_size=512",
    "training.device_batch_size=8",
    "training.max_steps=2",
    "training.log_every=1",
    "training.device=cpu",
)
QUIET = ("logging.plots=false", "inference.prompts=[]", "data.megatron_val_prefix=")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tokenizer = train_tokenizer([sample(0, index) for index in range(30)], TokenizerTrainingSpec(vocab_size=300))
    tokenizer.save(folder / "tokenizer")
    build_token_files(GrammarCorpusSpec(num_train_stories=8), "train", tokenizer, folder / "train", workers=1)
    return folder


def settings(folder: Path, files: Path, name: str, *more: str) -> list[str]:
    paths = [f"run.dir={folder}", f"run.name={name}", f"tokenizer.path={files / 'tokenizer'}"]
    return [*TINY, *SIZES, *QUIET, *paths, f"data.megatron_train_prefix={files / 'train'}", *more]


def rows_of(run: Path) -> int:
    return json.loads((run / "config.json").read_text())["training"]["device_batch_size"]


def test_memory_settings_change_no_number(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks that are computed again, and a micro-batch that the run chooses: the same weights, bit for bit."""
    assert train.main(settings(tmp_path, files, "one", "training.device_batch_size=8")) == 0
    more = ["training.device_batch_size=0", "training.activation_checkpointing=blocks"]
    assert train.main(settings(tmp_path, files, "other", *more)) == 0
    assert rows_of(tmp_path / "other") == 8
    assert "training.device_batch_size is 8" in capsys.readouterr().out
    assert diff_runs.main([str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    longer = settings(tmp_path, files, "one", "training.device_batch_size=0", "training.max_steps=3")
    assert train.main([*longer, "--resume", "--new-horizon"]) == 0
    assert rows_of(tmp_path / "one") == 8  # what it began with


def test_what_does_not_fit_is_one_sentence_before_the_data_are_opened(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        pytest.fail("the data were opened")

    monkeypatch.setattr(cli.training, "open_run_data", refuse)
    monkeypatch.setattr(cli.rehearsal, "rehearse", lambda *_, **__: Rehearsal(5 << 30, 4 << 30, was_refused=False))
    assert train.main(settings(tmp_path, files, "r")) == EXIT_FAILURE
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "8 windows of 32 tokens" in output.err
    assert "need about 5.0 GiB, and cpu has 4.0 GiB" in output.err and "lower training.device_batch_size" in output.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("objective", ["ar", "diffusion", "dual"])
def test_the_made_up_batch_is_like_a_real_one(tmp_path: Path, files: Path, objective: str) -> None:
    config = configured(settings(tmp_path, files, "r", f"training.objective={objective}"))
    ingredients = cli.training.open_ingredients(config, "")
    task = cli.training.task_of(config, ingredients.tokenizer, torch.device("cpu"))
    steps = ingredients.data.source(0, 1).steps(None)
    real = task.prepare(next(steps)[0][0], 0)
    steps.close()
    made_up = task.prepare(made_up_batch(8, 32), 0)
    assert {name: (t.shape, t.dtype) for name, t in made_up.items()} == {
        name: (t.shape, t.dtype) for name, t in real.items()
    }


def configured(assignments: list[str]) -> TrainConfig:
    return load(TrainConfig, shipped("train"), assignments).config


@pytest.mark.parametrize(("limit", "rows"), [(1, 1), (5, 4), (7, 6), (15, 8), (16, 16), (99, 16)])
def test_on_cuda_the_most_that_fits_is_found(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, limit: int, rows: int
) -> None:
    """16 rows a step: 5 that fit are evened out to 4, 7 to 6."""
    compiled: list[bool] = []

    def rehearse(build: Any, task: Any, batch: Any, world: Any, *, training: Any, **_: Any) -> Rehearsal:
        compiled.append(training.compile)
        return Rehearsal(len(batch["valid"]) * 900 // limit, 1000, was_refused=False)

    monkeypatch.setattr(cli.rehearsal, "rehearse", rehearse)
    config = configured(settings(tmp_path, files, "r", "training.device_batch_size=0", "training.compile=true"))
    cpu, cuda = alone(), World(rank=0, size=1, device=torch.device("cuda"))
    task = cli.training.task_of(config, Tokenizer.load(files / "tokenizer"), cpu.device)
    found = rehearsed(config, task, cuda, lambda: pytest.fail("not built"))
    assert found.training == replace(config.training, device_batch_size=rows)
    assert compiled == [*[False] * (len(compiled) - 1), True]


def test_in_tree_mode_the_number_is_chosen_by_hand(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["training.device_batch_size=0", "distributed.reduction=tree", "training.threads=1"]
    assert train.main(settings(tmp_path, files, "r", *more)) == EXIT_USAGE
    assert "choose one" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_search_on_a_real_device(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["training.device=cuda", "training.device_batch_size=0"]
    assert train.main(settings(tmp_path, files, "fits", *more)) == 0
    assert rows_of(tmp_path / "fits") == 16
    huge = ["model.d_model=16384", "model.num_heads=128", "model.num_layers=64"]
    assert train.main(settings(tmp_path, files, "huge", "training.device=cuda", *huge)) == EXIT_FAILURE
    assert "smaller" in capsys.readouterr().err and not (tmp_path / "huge").exists()
