"""Runs on token files: which order and blend they read, and what is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import train
from cli.token_files import build_token_files
from config.corpora import GrammarCorpusSpec
from trainkit.data.token_manifest import manifest_path
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE
from transformerlm.corpus.stories import sample
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.trainer import train_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and two sets of training files made with it."""
    folder = tmp_path_factory.mktemp("files")
    texts = [sample(0, index) for index in range(30)]
    tokenizer = train_tokenizer(texts, TokenizerTrainingSpec(vocab_size=300))
    tokenizer.save(folder / "tokenizer")
    for name, seed in (("a", 0), ("b", 1)):
        corpus = GrammarCorpusSpec(num_train_stories=6, seed=seed)
        build_token_files(corpus, "train", tokenizer, folder / name, workers=1)
    other = train_tokenizer(texts, TokenizerTrainingSpec(vocab_size=290))
    build_token_files(GrammarCorpusSpec(num_train_stories=6), "train", other, folder / "other", workers=1)
    return folder


def run(folder: Path, files: Path, *more: str, steps: int = 4) -> int:
    tiny = ["model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.context_length=32"]
    sizes = ["training.total_batch_size=256", "training.device_batch_size=4", f"training.max_steps={steps}"]
    quiet = ["inference.prompts=[]", "training.device=cpu", "data.megatron_val_prefix=", "training.log_every=1"]
    paths = [f"run.dir={folder}", "run.name=r", f"tokenizer.path={files / 'tokenizer'}"]
    return train.main([*tiny, *sizes, *quiet, *paths, *more])


def one(files: Path, name: str = "a") -> str:
    return f"data.megatron_train_prefix={files / name}"


def blend(files: Path, *names: str) -> list[str]:
    prefixes = json.dumps([str(files / name) for name in names])
    weights = json.dumps([1.0 + place for place in range(len(names))])
    return ["data.megatron_train_prefix=", f"data.blend_prefixes={prefixes}", f"data.blend_weights={weights}"]


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record.get("kind") == "train"]


def test_what_is_refused_before_the_first_step_is_no_run(tmp_path: Path, files: Path) -> None:
    """The corrected command begins it, without `--resume`. One is refused by the command, one by the loop."""
    wrong = {"checkpoint.init_from=nowhere": EXIT_FAILURE, "distributed.reduction=tree": EXIT_USAGE}
    for setting, code in wrong.items():
        assert run(tmp_path, files, one(files), setting, steps=2) == code
        assert json.loads((tmp_path / "r" / "status.json").read_text())["status"] == "failed"
    assert run(tmp_path, files, one(files), steps=2) == 0
    assert len(losses(tmp_path)) == 2
    (tmp_path / "r" / "metrics.jsonl").unlink()
    assert run(tmp_path, files, one(files), "checkpoint.init_from=nowhere", steps=2) == EXIT_USAGE  # a run, as it was


@pytest.mark.parametrize("order", ["stable", "megatron"])
def test_a_stopped_run_goes_on_in_any_order(tmp_path: Path, files: Path, order: str) -> None:
    """`prefetch` reads ahead up to the very end of Megatron-LM's order, which has one."""
    settings = [f"data.order={order}", *blend(files, "a", "b")]
    assert run(tmp_path / "whole", files, *settings) == 0
    assert run(tmp_path / "parts", files, "checkpoint.keep_last=9", "training.save_every=2", *settings) == 0
    for name in ("step-00000004", "latest", "best"):
        place = tmp_path / "parts" / "r" / "checkpoints" / name
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            place.rename(tmp_path / "moved")
    assert run(tmp_path / "parts", files, "--resume", "checkpoint.keep_last=9", "training.save_every=2", *settings) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert list((tmp_path / "parts" / "r").glob("metrics.attempt-*"))  # steps 3 and 4 were trained twice


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_the_order_of_megatron_lasts_for_steps_that_grow(tmp_path: Path, files: Path, names: list[str]) -> None:
    """It has an end, which lies behind the last step however many samples that one takes."""
    data = one(files) if len(names) == 1 else blend(files, *names)
    growing = ["data.order=megatron", "training.batch_size_factors=[[1, 2], [3, 5]]"]
    assert run(tmp_path, files, *growing, *([data] if isinstance(data, str) else data)) == 0
    assert len(losses(tmp_path)) == 4


def test_orders_and_blends_differ(tmp_path: Path, files: Path) -> None:
    found = []
    for number, more in enumerate(([one(files)], [one(files), "data.order=megatron"], blend(files, "a", "b"))):
        assert run(tmp_path / str(number), files, *more, steps=2) == 0
        found.append(tuple(losses(tmp_path / str(number))))
    assert len(set(found)) == 3


def test_a_longer_run_in_the_order_of_megatron_is_refused(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, files, one(files), "data.order=megatron", steps=2) == 0
    assert run(tmp_path, files, "--resume", one(files), "data.order=megatron", steps=3) == EXIT_USAGE
    assert "training.max_steps" in capsys.readouterr().err


def test_damage_is_found_before_the_first_step(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in files.glob("a.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    with (copy / "a.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\x01")
    for more in ([one(copy)], [*blend(copy, "a"), f'data.blend_prefixes=["{copy / "a"}","{files / "b"}"]']):
        more = [*more, "data.blend_weights=[1,1]"] if len(more) > 1 else more
        assert run(tmp_path / "runs", files, *more, "data.verify=true") == EXIT_FAILURE
        error = capsys.readouterr().err
        assert "a.bin does not match its SHA-256" in error and "Traceback" not in error
        assert not (tmp_path / "runs" / "r" / "config.json").exists()
    manifest_path(copy / "a").unlink()
    assert run(tmp_path / "runs", files, one(copy), "data.verify=true") == EXIT_FAILURE
    assert "nothing to verify" in capsys.readouterr().err
    assert run(tmp_path / "runs", files, one(copy), steps=1) == 0  # unverified, it looks sound


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-2]), "a.bin has"),
        (lambda folder: (folder / "a.idx").unlink(), "a.idx does not exist, but a.bin does"),
        (lambda folder: (folder / "a.json").write_bytes((folder / "b.json").read_bytes()), "a.json says"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str], change: object, words: str
) -> None:
    for path in files.glob("[ab].*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert callable(change)
    change(tmp_path)
    assert run(tmp_path / "runs", files, one(tmp_path)) == EXIT_FAILURE
    assert words in capsys.readouterr().err


def test_all_members_of_a_blend_are_of_one_tokenizer(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, files, *blend(files, "a", "other")) == EXIT_FAILURE
    assert "other was made with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (['data.blend_prefixes=["x","y"]', "data.blend_weights=[1,1]", "data.megatron_train_prefix=z"], "has both"),
        (['data.blend_prefixes=["x","y"]', "data.blend_weights=[1]"], "has 2 entries, blend_weights 1"),
        (
            ['data.blend_prefixes=["x","y"]', "data.blend_weights=[1,0]"],
            "data.blend_weights[1]: must be greater than 0",
        ),
        (['data.blend_prefixes=["x","x"]', "data.blend_weights=[1,2]"], "names 'x' twice"),
        (['data.blend_prefixes=["x"]', "data.blend_weights=[1]"], "set megatron_train_prefix to 'x' instead"),
        (["data.order=random"], "data.order"),
    ],
)
def test_what_cannot_be_a_blend(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert run(tmp_path, files, "data.megatron_train_prefix=", *more) == EXIT_USAGE
    assert words in capsys.readouterr().err
