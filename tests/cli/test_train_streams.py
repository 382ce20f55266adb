"""Training on text itself: `--text`, packed and rows, named validation sets, variants, other numbers of ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import eval as evaluation
from cli import train
from cli.text_sources import held_out_texts, training_documents
from tests.cli.test_pipeline import records
from tests.faults.test_kills import digest
from trainkit.artifacts import read_manifest
from trainkit.data import hub
from trainkit.data.document_sets import ShardedDocuments
from trainkit.data.documents import open_local_documents
from trainkit.data.specs import PackedDataSpec
from trainkit.data.splits import iterate, pieces
from trainkit.errors import UserError
from trainkit.interrupts import Interrupts
from transformerlm.corpus.stories import sample

ROOT = Path(__file__).parents[2]
TINY = [
    "model.num_layers=1",
    "model.d_model=32",
    "model.num_heads=2",
    "model.context_length=32",
    "training.total_batch_size=256",
    "training.device_batch_size=2",
    "training.max_steps=8",
    "training.log_every=1",
    "training.eval_every=4",
    "training.save_every=3",
    "training.sample_every=0",
    "training.threads=1",
    "training.precision=fp32",
    "logging.plots=false",
    "optimizer.kind=adamw",
    "inference.prompts=[]",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformerlm.tokenizer.specs import TokenizerTrainingSpec
    from transformerlm.tokenizer.trainer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    spec = TokenizerTrainingSpec(vocab_size=400)
    train_tokenizer((sample(3, index) for index in range(60)), spec).save(path)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def write_stories(path: Path, indices: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": sample(7, index)}) + "\n" for index in indices))


def arguments(mode: str, tokenizer: Path, *more: str) -> list[str]:
    data = [f"data.pipeline_mode={mode}", "data.dataset_name=stories", "data.shuffle_window=16", "data.lanes=4"]
    return ["--config-name", "train_packed", "run.name=run", f"tokenizer.path={tokenizer}", *data, *TINY, *more]


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in records(run) if record["kind"] == kind]


def test_text_alone_becomes_a_model(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # One document without a separator, as a book is.
    Path("My book.txt").write_text("\n\n".join(sample(1, index) for index in range(120)))
    assert train.main(["--text", "My book.txt", "--vocab-size", "400", *TINY]) == 0
    run = place / "runs" / "My-book"
    told = capfd.readouterr().err
    assert "10% of it held out" in told and re.search(r"\[text\] [1-9]\d* documents held out .*, \d+ to train on", told)
    assert metrics(run, "train")[-1]["step"] == 8 and metrics(run, "eval")[-1]["val_loss"] > 0
    made = Path("artifacts/My-book/tokenizer")
    before = read_manifest(made)
    assert train.main(["--text", "My book.txt", "--vocab-size", "400", *TINY, "--name", "again"]) == 0
    assert read_manifest(made) == before and "up to date" in capfd.readouterr().err
    # The recorded configuration needs no --text any more.
    assert train.main(["--config", str(run / "config.toml"), "--name", "third"]) == 0
    assert records(place / "runs" / "third") == records(place / "runs" / "again")

    Path("My book.txt").write_text("\n".join(f"{n} is something else entirely" for n in range(4000)))
    assert train.main(["--text", "My book.txt", "--vocab-size", "400", *TINY, "--name", "other"]) == 0
    assert read_manifest(made) != before
    # A tokenizer that was named is used as it is.
    own = ["--text", "My book.txt", f"tokenizer.path={made}", "--name", "own"]
    assert train.main([*own, *TINY]) == 0
    capfd.readouterr()
    assert train.main(["--text", "gone.txt"]) == 1
    assert "--text gone.txt does not exist" in capfd.readouterr().err


def test_validation_sets_by_name(place: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_stories(Path("stories/train.jsonl"), range(100))
    write_stories(Path("stories/validation/a.jsonl"), range(100, 110))
    write_stories(Path("stories/extra.jsonl"), range(110, 115))
    write_stories(Path("elsewhere.jsonl"), range(115, 118))
    sets = ["data.validation_sets.extra=extra", "data.validation_sets.far=elsewhere.jsonl"]
    assert train.main(arguments("packed", tokenizer, *sets, "evaluation.max_documents=0")) == 0
    last = metrics(place / "runs/run", "eval")[-1]
    names = {"val_loss", "val_loss/extra", "val_loss/far", "val_bits_per_byte/far", "val_perplexity/extra"}
    assert names <= last.keys()
    best = json.loads((place / "runs/run/summary.json").read_text())["best"]
    lowest = min(record["val_loss"] for record in metrics(place / "runs/run", "eval"))
    assert (best["metric"], best["value"]) == ("val_loss", lowest)
    header = (place / "runs/run/metrics.csv").read_text().splitlines()[0]
    assert "val_loss/extra" in header
    capfd.readouterr()
    for name, key, count in (("val", "val_loss", 10), ("extra", "val_loss/extra", 5), ("far", "val_loss/far", 3)):
        step = ["--ckpt", "runs/run/checkpoints/latest", "--json", f"data.set={name}", "--device", "cpu"]
        assert evaluation.main(step) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["documents"] == count and report["loss"] == pytest.approx(last[key], rel=1e-5)
    assert evaluation.main(["--ckpt", "runs/run", "data.set=nope", "--device", "cpu"]) == 1
    err = capfd.readouterr().err
    assert "no set 'nope'" in err and "extra, far" in err
    assert evaluation.main(["--ckpt", "runs/run", "data.set=test", "--device", "cpu"]) == 1
    assert "kept no test set; give the next run one with data.test_fraction" in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["packed", "rows"])
def test_resume_is_the_undisturbed_run(
    place: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    write_stories(Path("stories/all.jsonl"), range(40))
    held_out = ["data.train_split=", "data.validation_fraction=0.2"]
    assert train.main(arguments(mode, tokenizer, *held_out, "run.name=whole")) == 0
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "requested", property(lambda self: next(calls) >= 4))
        assert train.main(arguments(mode, tokenizer, *held_out)) == 75
    assert train.main([*arguments(mode, tokenizer, *held_out, "data.workers=0", "data.prefetch=0"), "--resume"]) == 0
    assert records(place / "runs/run") == records(place / "runs/whole")


def test_the_small_variant_is_the_beginning(place: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_stories(Path("stories/train.jsonl"), range(60))
    write_stories(Path("stories/validation.jsonl"), range(100, 120))
    small = ["data.dataset_variant=small", "data.small_train_samples=20", "data.small_val_samples=6"]
    assert train.main(arguments("rows", tokenizer, *small, "run.name=small")) == 0
    write_stories(Path("stories/train.jsonl"), range(20))
    write_stories(Path("stories/validation.jsonl"), range(100, 106))
    assert train.main(arguments("rows", tokenizer, "run.name=cut")) == 0
    assert records(place / "runs/small") == records(place / "runs/cut")


def test_what_cannot_be_is_one_sentence(place: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_stories(Path("stories/train.jsonl"), range(10))
    (place / "empty").mkdir()
    for more, code, words in (
        (["data.dataset_name=gone.jsonl"], 1, 'data.dataset_name = "gone.jsonl" does not exist'),
        (["data.val_split=valid"], 1, 'nothing named "valid" (data.val_split): it has train.jsonl; name one'),
        (
            ["data.val_split=", "data.validation_sets.wiki=no"],
            1,
            '"no" (data.validation_sets.wiki): it has train.jsonl',
        ),
        (
            ["data.train_split=foo", "data.val_split="],
            1,
            "(data.train_split): it has train.jsonl; name one of these, or",
        ),
        (
            ["data.dataset_name=stories/train.jsonl", "data.train_split=foo"],
            1,
            "(data.train_split): it is one file without splits; leave it out",
        ),
        (["data.text_field=story", "data.val_split="], 1, "'story'"),
        (["data.dataset_name=empty"], 1, "empty"),
        (["tokenizer.path=gone"], 1, "tokenizer.path = gone does not exist"),
        (["data.lanes=3"], 2, "data.lanes: must be one of 1, 2, 4, 8"),
        (["data.lanes=16"], 2, "multiple of data.lanes (16)"),
        (["data.validation_fraction=0.6", "data.test_fraction=0.5"], 2, "leave some to train on"),
        (["data.validation_sets.val=x"], 2, "choose another name"),
        (["data.dataset_name="], 2, "data.dataset_name is required"),
    ):
        assert train.main(arguments("packed", tokenizer, *more)) == code, more
        err = capfd.readouterr().err
        assert words in err and "Traceback" not in err and err.count("\n") == 1, err
    assert not (place / "runs").exists()


def test_the_validation_split_is_not_trained_on(
    place: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_stories(Path("stories/all.jsonl"), range(10))
    write_stories(Path("stories/validation.jsonl"), range(100, 110))
    assert train.main(arguments("packed", tokenizer)) == 1
    assert 'has "validation" and nothing named "train"' in capfd.readouterr().err
    spec = PackedDataSpec(dataset_name="stories", train_split="all")
    assert list(iterate(training_documents(spec, ""))) == [sample(7, index) for index in range(10)]
    assert held_out_texts(spec, "val", "") == [sample(7, index) for index in range(100, 110)]
    assert held_out_texts(spec, "test", "") is None


def test_a_share_is_held_out_of_pieces(place: Path) -> None:
    """Training, validation and test documents of one book: together all of it, none twice."""
    book = "\n\n".join(sample(2, index) for index in range(40))
    Path("book.txt").write_text(book)
    spec = PackedDataSpec(
        dataset_name="book.txt", validation_fraction=0.2, test_fraction=0.2, max_document_characters=300
    )
    train_texts = list(iterate(training_documents(spec, "")))
    held_out = [text for split in ("val", "test") for text in held_out_texts(spec, split, "") or []]
    assert sorted(train_texts + held_out) == sorted(pieces(book, 300))
    assert train_texts and held_out and not set(train_texts) & set(held_out)


@pytest.mark.parametrize("variant", ["full", "small"])
def test_documents_of_the_hub_are_cut_too(place: Path, monkeypatch: pytest.MonkeyPatch, variant: Any) -> None:
    Path("book.txt").write_text(book := "\n\n".join(sample(2, index) for index in range(40)))
    monkeypatch.setattr(hub, "open_hub_documents", lambda *arguments, **options: open_local_documents("book.txt"))
    spec = PackedDataSpec(
        dataset_name="some/book", max_document_characters=300, dataset_variant=variant, small_train_samples=5
    )
    expected = list(pieces(book, 300))
    found = list(iterate(training_documents(spec, "commit")))
    assert found == (expected[:5] if variant == "small" else expected) and len(expected) > 5
    with pytest.raises(UserError, match=r"some/book.* needs data\.streaming = true"):
        training_documents(replace(spec, streaming=False), "commit")


def test_a_run_keeps_the_revision_it_began_with(
    place: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_stories(Path("train.jsonl"), range(20))
    newest, opened = ["first"], list[tuple[str, str]]()

    def open_hub_documents(name: str, *, split: str, revision: str, **options: Any) -> ShardedDocuments:
        opened.append((split, revision))
        found = open_local_documents("train.jsonl")
        return ShardedDocuments(found.shards, f"{name} {split} {revision}")

    monkeypatch.setattr(hub, "resolve_revision", lambda *arguments, **options: newest[-1])
    monkeypatch.setattr(hub, "open_hub_documents", open_hub_documents)
    remote = arguments("packed", tokenizer, "data.dataset_name=some/stories", "training.save_every=2")
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "requested", property(lambda self: next(calls) >= 2))
        assert train.main(remote) == 75
    newest.append("second")
    assert train.main([*remote, "--resume"]) == 0
    assert evaluation.main(["--ckpt", "runs/run", "--device", "cpu"]) == 0
    assert set(opened) == {("train", "first"), ("validation", "first")}
    assert train.main([*remote, "run.name=later"]) == 0
    assert opened[-1][1] == "second"
    capfd.readouterr()
    assert train.main([*remote, "data.revision=second", "--resume"]) == 2
    assert "data.revision" in capfd.readouterr().err


@pytest.mark.parametrize("setting", ["init_from", "resume_from"])
def test_weights_of_another_run_want_its_tokenizer(
    place: Path, capfd: pytest.CaptureFixture[str], setting: str
) -> None:
    """Two tokenizers of one size: the weights would fit, and mean nothing."""
    Path("a.txt").write_text("\n\n".join(sample(1, index) for index in range(120)))
    Path("b.txt").write_text("\n".join(f"{n} is something else entirely" for n in range(4000)))
    sizes = ["--vocab-size", "300", *TINY]
    assert train.main(["--text", "a.txt", *sizes]) == 0
    begin = ["--text", "b.txt", *sizes, f"checkpoint.{setting}=runs/a"]
    assert train.main(begin) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert "another tokenizer" in told and told.endswith(
        "set tokenizer.path = runs/a/checkpoints/step-00000008/tokenizer"
    )
    right = [*begin, "tokenizer.path=runs/a/checkpoints/step-00000008/tokenizer", "run.name=right"]
    assert train.main(right) == (0 if setting == "init_from" else 2)
    ended = "nothing is left to train; raise that and add --new-horizon" in capfd.readouterr().err
    assert ended == (setting == "resume_from")


def test_resume_without_a_run_says_so(place: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_stories(Path("stories/train.jsonl"), range(20))
    assert train.main([*arguments("packed", tokenizer, "data.val_split=", "--max-steps=1"), "--resume"]) == 0
    assert "no run in runs/run to resume: a new one starts" in capfd.readouterr().err


@pytest.mark.slow
def test_text_on_two_processes_becomes_the_model_of_one(place: Path) -> None:
    """`--text` in tree mode: the second process finds the tokenizer that the first one makes. One SHA-256."""
    Path("book.txt").write_text("\n\n".join(sample(1, index) for index in range(120)))
    tree = ["distributed.reduction=tree", "training.context_length_divisors=[[0, 2], [4, 1]]"]
    command = [sys.executable, "-m", "cli.train", "--text", "book.txt", "--vocab-size", "400", *TINY, *tree]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    digests: set[str] = set()
    for ranks in (2, 1):
        more = [f"run.name=on-{ranks}", f"distributed.processes={ranks}"]
        done = subprocess.run([*command, *more], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(digest(place / "runs" / f"on-{ranks}"))
    assert len(digests) == 1
    assert metrics(place / "runs/on-1", "train") == metrics(place / "runs/on-2", "train")


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_to_the_bit(place: Path, tokenizer: Path) -> None:
    """Three steps on two ranks, the rest on one: every metric is that of a run on one rank."""
    write_stories(Path("stories/train.jsonl"), range(80))
    write_stories(Path("stories/validation.jsonl"), range(100, 200))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*more: str, ranks: int) -> None:
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "cli.train"]
        command += arguments("packed", tokenizer, *more)
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    start("run.name=one", ranks=1)
    start("run.name=two", ranks=2)
    assert records(place / "runs/one") == records(place / "runs/two")
    # As after a kill: the run ends at its checkpoint of step 3, the later ones are gone.
    import shutil

    for step in ("step-00000006", "step-00000008"):
        shutil.rmtree(place / "runs/two/checkpoints" / step)
    start("run.name=two", "--resume", ranks=1)
    assert records(place / "runs/one") == records(place / "runs/two")
