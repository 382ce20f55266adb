"""A folder as somebody has it who follows the documents: texts, token files, runs. All of it tiny."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cli import make_data, pipeline, train_tokenizer
from tests.docs.documents import ROOT
from transformerlm.corpus.stories import sample

STORIES = [sample(7, number) for number in range(40)]
TINY_CORPUS = ("corpus.num_train_stories=60", "corpus.num_val_stories=6")
TINY_MODEL = ("model.num_layers=1", "model.d_model=16", "model.num_heads=2")
TINY_RUN = (
    "model.context_length=256",
    "training.max_steps=2",
    "training.total_batch_size=2048",
    "training.device_batch_size=8",
    "training.log_every=1",
    "training.save_every=1",
    "training.precision=fp32",
    "training.device=cpu",
    "training.threads=1",
    "evaluation.max_documents=2",
    "evaluation.draws=1",
    "inference.total_length=24",
    "logging.plots=false",
)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; `workspace` is a copy."""
    folder = tmp_path_factory.mktemp("furnished")
    shutil.copytree(ROOT / "config" / "resources", folder / "config" / "resources")
    shutil.copy(ROOT / "README.md", folder)  # one of its tables can be written again
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _write_texts()
        assert train_tokenizer.main([*TINY_CORPUS, "--vocab-size", "300"]) == 0
        assert make_data.main([*TINY_CORPUS, "--workers", "1"]) == 0
        for name in ("quickstart", "quickstart_diffusion", "quickstart_dual"):
            settings = ("tokenizer.vocab_size=300", "corpus.num_test_stories=2", *TINY_CORPUS, *TINY_MODEL, *TINY_RUN)
            assert pipeline.main(["--config-name", name, *settings]) == 0
    _copy_what_is_alike(folder)
    return folder


def _write_texts() -> None:
    separator = "\n<|endoftext|>\n"
    Path("data").mkdir()
    for name in ("my.txt", "stories.txt", "corpus.txt", "val.txt", "data/input.txt"):
        Path(name).write_text(separator.join(STORIES))
    lines = "".join(json.dumps({"text": story}) + "\n" for story in STORIES)
    Path("tinystories").mkdir()
    for name in ("train", "val", "stories", "tinystories/train", "tinystories/validation"):
        Path(f"{name}.jsonl").write_text(lines)


def _copy_what_is_alike(folder: Path) -> None:
    for name, source in {
        "runs/tinystories": "runs/quickstart",
        "runs/one": "runs/quickstart",
        "runs/other": "runs/quickstart",
        "runs/ar": "runs/quickstart",
        "runs/dual": "runs/quickstart_dual",
        "artifacts/tinystories/tokenizer": "data/tokenizer",
        "data/simplestories_8k": "data/tokenizer",
    }.items():
        shutil.copytree(folder / source, folder / name, symlinks=True)
    for name in ("web", "books", "simplestories_train_text_document", "simplestories_test_text_document"):
        for ending in ("bin", "idx", "json"):
            shutil.copy(folder / f"data/train.{ending}", folder / f"data/{name}.{ending}")


@pytest.fixture
def workspace(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: a copy that a document may change."""
    folder = tmp_path / "workspace"
    shutil.copytree(furnished, folder, symlinks=True)
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)
