"""Text to token files: the same for any number of workers, made again exactly when something changed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli import corpora, make_data, token_files
from cli.corpora import fingerprint, has_split, open_documents
from cli.token_files import build_token_files
from config.corpora import CorpusSpec, FilesCorpusSpec, GrammarCorpusSpec, HubCorpusSpec
from trainkit.data import hub
from trainkit.data.document_sets import ShardedDocuments
from trainkit.data.megatron import IndexedTokens
from trainkit.data.megatron_writer import IndexedWriter
from trainkit.data.splits import Split
from trainkit.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, UserError
from transformerlm.corpus.stories import sample, split_seed
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".bin", ".idx", ".json")
UNFINISHED = ".tmp-unfinished"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([sample(0, index) for index in range(30)], TokenizerTrainingSpec(vocab_size=300))


@pytest.fixture(scope="module")
def tokenizer_path(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t"
    tokenizer.save(path)
    return path


def rows(path: Path, *texts: str) -> FilesCorpusSpec:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FilesCorpusSpec(train_paths=(str(path),))


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_documents_come_back_and_cannot_end_themselves(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["Once upon a time", "", "one<|endoftext|>still one<|pad|>", " café 😀\n\x00", "", "end"]
    prefix = tmp_path / "out" / "train"
    made = build_token_files(rows(tmp_path / "x.jsonl", *texts), "train", tokenizer, prefix)
    data = IndexedTokens.open(prefix)
    kept = [text for text in texts if text]
    assert [tokenizer.decode(data.document(i)[:-1]) for i in range(len(data))] == kept
    assert (data.tokens == tokenizer.eot_id).nonzero()[0].tolist() == (data.offsets[1:] - 1).tolist()
    assert not made.reused and made.manifest == data.manifest
    assert made.manifest.text_bytes == sum(len(text.encode()) for text in kept)
    assert made.manifest.tokenizer == tokenizer.content_hash
    assert made.manifest.source["empty_documents_left_out"] == 2
    assert made.manifest.dtype == "uint16"
    assert tokenizer.byte_lengths()[data.tokens].sum() == made.manifest.text_bytes


@pytest.mark.parametrize("kind", ["grammar", "files"])
def test_files_do_not_depend_on_workers_and_chunks(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    corpus: CorpusSpec = GrammarCorpusSpec(num_train_stories=50)
    if kind == "files":
        corpus = rows(tmp_path / "x.jsonl", *(sample(1, index) for index in range(50)), "", "last")
    build_token_files(corpus, "train", tokenizer, tmp_path / "a", workers=1)
    monkeypatch.setattr(token_files, "CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(token_files, "CHUNK_STORIES", 7)
    build_token_files(corpus, "train", tokenizer, tmp_path / "b", workers=1)
    build_token_files(corpus, "train", tokenizer, tmp_path / "c", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_grammar_documents_are_the_stories_of_the_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = GrammarCorpusSpec(num_train_stories=3, num_val_stories=2, seed=5)
    for split, count in (("train", 3), ("val", 2)):
        build_token_files(corpus, split, tokenizer, tmp_path / split)
        data = IndexedTokens.open(tmp_path / split)
        texts = [tokenizer.decode(data.document(i)[:-1]) for i in range(len(data))]
        assert texts == [sample(split_seed(5, split), index) for index in range(count)]


def test_few_chunks_are_under_way(tokenizer: Tokenizer) -> None:
    """Memory is bounded by the workers: the text is not read ahead of them."""
    read = itertools.count()
    chunks = ([f"text {next(read)}"] for _ in range(1000))
    results = token_files._encode_all(chunks, tokenizer, np.dtype("u2"), 2)
    next(results)
    assert next(read) <= 5
    results.close()


def test_reused_only_while_everything_matches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text, prefix = tmp_path / "x.jsonl", tmp_path / "train"

    def build(corpus: CorpusSpec, tokenizer: Tokenizer = tokenizer, **options: object) -> bool:
        return build_token_files(corpus, "train", tokenizer, prefix, **options).reused  # type: ignore[arg-type]

    corpus = rows(text, "one", "two")
    assert not build(corpus)
    before = contents(prefix)
    assert build(corpus) and build(corpus, check=True)
    assert not build(corpus, force=True)
    assert contents(prefix) == before
    os.utime(text)
    assert build(corpus)
    rows(text, "one", "owt")
    assert not build(corpus) and build(corpus)
    assert not build(corpus, dtype="int32") and build(corpus, dtype="int32")
    other = tokenizer.with_special_tokens(["<|more|>"])
    assert not build(corpus, other, dtype="int32") and build(corpus, other, dtype="int32")
    assert entries(tmp_path) == ["train.bin", "train.idx", "train.json", "x.jsonl"]


def test_damaged_files_are_made_again_or_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus, prefix = rows(tmp_path / "x.jsonl", "one", "two"), tmp_path / "train"
    build_token_files(corpus, "train", tokenizer, prefix)
    before = contents(prefix)
    path = Path(f"{prefix}.bin")
    flipped = bytearray(before[0])
    flipped[3] ^= 1
    path.write_bytes(flipped)
    assert build_token_files(corpus, "train", tokenizer, prefix).reused  # a look at the structure cannot see it
    with pytest.raises(UserError, match=r"train\.bin does not match its SHA-256"):
        build_token_files(corpus, "train", tokenizer, prefix, check=True)
    path.write_bytes(before[0][:-2])
    assert not build_token_files(corpus, "train", tokenizer, prefix).reused
    path.unlink()
    assert not build_token_files(corpus, "train", tokenizer, prefix).reused
    assert contents(prefix) == before


def test_files_of_others_are_not_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = rows(tmp_path / "x.jsonl", "one")
    (tmp_path / "raw.json").write_text('{"text": "precious"}')
    for force in (False, True):
        with pytest.raises(UserError, match=r"raw.json is not a manifest.*choose another prefix"):
            build_token_files(corpus, "train", tokenizer, tmp_path / "raw", force=force)
    with IndexedWriter(tmp_path / "foreign", "uint16") as writer:
        writer.add(np.array([1, 2]))
    (tmp_path / "foreign.json").unlink()
    with pytest.raises(UserError, match=r"exist without foreign.json.*--force"):
        build_token_files(corpus, "train", tokenizer, tmp_path / "foreign")
    assert entries(tmp_path) == ["foreign.bin", "foreign.idx", "raw.json", "x.jsonl"]
    assert not build_token_files(corpus, "train", tokenizer, tmp_path / "foreign", force=True).reused


def test_bad_input_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "x.jsonl"
    corpus = rows(path, "")
    for content, words in (("", "no document"), ('{"text": ""}\n', "no tokens"), ('{"text": "one"}\n{', "line 2")):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            build_token_files(corpus, "train", tokenizer, tmp_path / "a")
    assert entries(tmp_path) == ["x.jsonl"]


def test_a_dtype_that_is_too_small_is_refused_before_the_work() -> None:
    assert token_files._dtype("uint16", 65_536) == np.uint16
    with pytest.raises(UserError, match="uint16 cannot hold the 65537 ids"):
        token_files._dtype("uint16", 65_537)


def test_the_test_split_has_files_of_its_own(tmp_path: Path, tokenizer_path: Path) -> None:
    assert make_data.main(arguments(tmp_path, tokenizer_path, "corpus.num_test_stories=3")) == 0
    assert len(IndexedTokens.open(tmp_path / "test")) == 3
    assert make_data.main(arguments(tmp_path, tokenizer_path, "corpus.num_test_stories=3", "--verify")) == 0


def test_which_splits_there_are() -> None:
    paths = ("x.txt",)
    assert has_split(GrammarCorpusSpec(), "val") and not has_split(GrammarCorpusSpec(num_val_stories=0), "val")
    assert has_split(FilesCorpusSpec(train_paths=paths), "train")
    assert not has_split(FilesCorpusSpec(train_paths=paths), "val")
    assert has_split(FilesCorpusSpec(train_paths=paths, val_paths=paths), "val")
    assert has_split(FilesCorpusSpec(train_paths=paths, validation_fraction=0.1), "val")


def test_held_out_documents_are_not_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {index}" for index in range(200)]
    rows(tmp_path / "x.jsonl", *texts)
    corpus = FilesCorpusSpec(train_paths=(str(tmp_path / "x.jsonl"),), validation_fraction=0.2)
    found: dict[str, list[str]] = {}
    for split in ("train", "val"):
        build_token_files(corpus, split, tokenizer, tmp_path / split)
        data = IndexedTokens.open(tmp_path / split)
        found[split] = [tokenizer.decode(data.document(i)[:-1]) for i in range(len(data))]
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    assert 10 < len(found["val"]) < 90


def test_one_long_text_is_cut_so_that_a_share_of_it_can_be_held_out(tmp_path: Path) -> None:
    text = "".join(f"This is the sentence number {i} of one text.\n" for i in range(500))
    (tmp_path / "x.txt").write_text(text)
    paths = (str(tmp_path / "x.txt"),)
    corpus = FilesCorpusSpec(train_paths=paths, validation_fraction=0.2, max_document_characters=300)
    found = {split: list(open_documents(corpus, split)) for split in ("train", "val")}
    assert len(found["val"]) > 5 and max(map(len, found["train"])) <= 300
    cut = list(open_documents(dataclasses.replace(corpus, validation_fraction=0.0), "train"))
    assert "".join(cut) == text and sorted(cut) == sorted(found["train"] + found["val"])


SPLITS: tuple[Split, ...] = ("train", "val", "test")
SETTINGS: dict[type, dict[str, tuple[object, str]]] = {
    GrammarCorpusSpec: {
        "num_train_stories": (3, "train"),
        "num_val_stories": (3, "val"),
        "num_test_stories": (3, "test"),
        "seed": (3, "train val test"),
    },
    FilesCorpusSpec: {
        "train_paths": (("b.txt",), "train val"),
        "val_paths": (("b.txt",), "train val"),
        "test_paths": (("b.txt",), "test"),
        "text_field": ("b", "train val test"),
        "validation_fraction": (0.3, "train val"),
        "test_fraction": (0.3, "train val test"),
        "max_document_characters": (3, "train val test"),
        "max_train_documents": (3, "train"),
        "max_val_documents": (3, "val"),
        "max_test_documents": (3, "test"),
    },
    HubCorpusSpec: {
        "dataset_name": ("b", "train val test"),
        "dataset_config": ("b", "train val test"),
        "revision": ("b", "train val test"),
        "train_split": ("b", "train"),
        "val_split": ("b", "val"),
        "test_split": ("b", "test"),
        "validation_fraction": (0.3, "train val"),
        "test_fraction": (0.3, "train test"),
        "text_field": ("b", "train val test"),
        "cache_dir": ("b", ""),
        "max_train_documents": (3, "train"),
        "max_val_documents": (3, "val"),
        "max_test_documents": (3, "test"),
    },
}
"""Each setting: another value, and the splits that it changes."""


@pytest.mark.parametrize(
    "corpus",
    [
        GrammarCorpusSpec(),
        FilesCorpusSpec(train_paths=("a.txt",), validation_fraction=0.1),
        HubCorpusSpec(dataset_name="a"),
    ],
    ids=lambda corpus: corpus.kind,
)
def test_a_setting_changes_the_fingerprint_of_the_splits_that_depend_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: CorpusSpec
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(name)
    settings = SETTINGS[type(corpus)]
    assert {"kind", *settings} == {field.name for field in dataclasses.fields(corpus)}
    for name, (value, splits) in settings.items():
        changed = dataclasses.replace(corpus, **{name: value})
        found = [split for split in SPLITS if fingerprint(corpus, split) != fingerprint(changed, split)]
        assert found == splits.split(), name


def test_with_validation_files_each_split_depends_on_its_own(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt"))
    corpus = FilesCorpusSpec(train_paths=(a,), val_paths=(b,))
    other_val = FilesCorpusSpec(train_paths=(a,), val_paths=(c,), validation_fraction=0.5)
    other_train = FilesCorpusSpec(train_paths=(c,), val_paths=(b,))
    assert fingerprint(corpus, "train") == fingerprint(other_val, "train") != fingerprint(other_train, "train")
    assert fingerprint(corpus, "val") == fingerprint(other_train, "val") != fingerprint(other_val, "val")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A data file whose rows may be an exception."""

    rows: Sequence[str | UserError]

    def read(self, start: int) -> Iterator[str]:
        for row in self.rows[start:]:
            if isinstance(row, UserError):
                raise row
            yield row


def serve(
    monkeypatch: pytest.MonkeyPatch,
    splits: Mapping[str, Sequence[str | UserError]],
    commit: str = "first",
    newest: str = "first",
) -> None:
    """Stand in for the hub, which tests of its own serve over HTTP."""

    def open_hub_documents(name: str, *, split: str, max_documents: int, **options: object) -> ShardedDocuments:
        assert options["revision"] == commit
        return ShardedDocuments([Rows(splits[split][: max_documents or None])], name)

    corpora._commit.cache_clear()
    monkeypatch.setattr(hub, "resolve_revision", lambda *arguments, **options: newest)
    monkeypatch.setattr(hub, "open_hub_documents", open_hub_documents)


BROKEN = ("one", UserError("row 2 of the data set 'x' has a number in 'text', not a string"))


def test_a_hub_stream_that_breaks_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {"train": BROKEN})
    with pytest.raises(UserError, match="row 2 of the data set 'x' has a number"):
        build_token_files(HubCorpusSpec(dataset_name="x"), "train", tokenizer, tmp_path / "a", workers=1)
    assert entries(tmp_path) == []


def test_hub_documents_are_limited_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i}" for i in range(40)]
    serve(monkeypatch, {"train": texts, "validation": ["v0", "v1"], "test": ["t0"]})
    corpus = HubCorpusSpec(dataset_name="x", max_train_documents=2, max_val_documents=1, test_split="test")
    found = [list(open_documents(corpus, split)) for split in SPLITS]
    assert found == [["text 0", "text 1"], ["v0"], ["t0"]]
    assert list(open_documents(dataclasses.replace(corpus, val_split=""), "val")) == []
    shared = HubCorpusSpec(dataset_name="x", validation_fraction=0.3, test_fraction=0.2)
    held_out = [list(open_documents(shared, split)) for split in SPLITS]
    assert sorted([*held_out[0], *held_out[1], *held_out[2]]) == sorted(texts) and all(held_out)
    few = dataclasses.replace(shared, max_train_documents=3, max_val_documents=2)
    assert [list(open_documents(few, split)) for split in SPLITS] == [held_out[0][:3], held_out[1][:2], held_out[2]]


# -- the command -------------------------------------------------------------------------------------------------------


def arguments(folder: Path, tokenizer_path: Path, *more: str) -> list[str]:
    outputs = [f"output.{split}_prefix={folder / split}" for split in ("train", "val", "test")]
    stories = ["corpus.num_train_stories=5", "corpus.num_val_stories=2"]
    return [f"tokenizer.path={tokenizer_path}", *outputs, *([] if "corpus.kind=files" in more else stories), *more]


def test_command(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_data.main(arguments(tmp_path, tokenizer_path)) == 0
    assert entries(tmp_path) == sorted(f"{split}{suffix}" for split in ("train", "val") for suffix in SUFFIXES)
    output = capsys.readouterr()
    assert "tokens in 5 documents, uint16, made in" in output.out and output.err == ""
    assert make_data.main(arguments(tmp_path, tokenizer_path)) == 0
    assert capsys.readouterr().out.count("up to date") == 2
    assert make_data.main(arguments(tmp_path, tokenizer_path, "--verify")) == 0
    assert capsys.readouterr().out.count("intact") == 2
    for split in ("train", "val"):
        with (tmp_path / f"{split}.bin").open("r+b") as file:
            file.write(b"\xff")
    assert make_data.main(arguments(tmp_path, tokenizer_path, "--verify")) == EXIT_FAILURE
    error = capsys.readouterr().err
    assert all(f"{split}.bin does not match its SHA-256" in error for split in ("train", "val"))
    assert error.count("transformerlm-make-data --force") == 2
    assert make_data.main(arguments(tmp_path, tokenizer_path, "--force")) == 0
    assert make_data.main(arguments(tmp_path, tokenizer_path, "--verify")) == 0


def test_command_without_validation_text(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text("one")
    own = ("corpus.kind=files", f'corpus.train_paths=["{tmp_path / "one.txt"}"]')
    assert make_data.main(arguments(tmp_path, tokenizer_path, *own)) == 0
    output = capsys.readouterr().out
    assert "in 1 document," in output and "no validation files were made" in output


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["tokenizer.path=none"], EXIT_FAILURE, "no tokenizer at none"),
        (["output.val_prefix=same", "output.train_prefix=same"], EXIT_USAGE, "val_prefix and test_prefix are same"),
        (["--workers", "-1"], EXIT_USAGE, "--workers"),
        (["--workers", "many"], EXIT_USAGE, "--workers"),
        (["corpus.kind=files", 'corpus.train_paths=["none.txt"]'], EXIT_FAILURE, "none.txt does not exist"),
        (["output.dtype=uint8"], EXIT_USAGE, "output.dtype"),
        (["--verify"], EXIT_FAILURE, "train.bin does not exist"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, words: str
) -> None:
    assert make_data.main(arguments(tmp_path, tokenizer_path, *more)) == code
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert entries(tmp_path) == []


def test_progress_is_shown_only_for_long_work(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_data, "QUIET_SECONDS", 0.0)
    assert make_data.main(arguments(tmp_path, tokenizer_path)) == 0
    assert "train: 5 documents" in capsys.readouterr().err


def start_build(folder: Path, tokenizer_path: Path, *more: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, saving all the time."""
    code = (
        "import sys; from cli import make_data, token_files\n"
        "token_files.SAVE_SECONDS, token_files.CHUNK_STORIES, token_files.CHUNK_CHARACTERS = 0.0, 16, 4000\n"
        "sys.exit(make_data.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments(folder, tokenizer_path, "output.val_prefix=", *more)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    )


def saved_lines(folder: Path) -> int:
    journal = folder / f".train.progress{UNFINISHED}"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for_saves(child: subprocess.Popen[str], folder: Path, count: int) -> None:
    """Until so much is saved; a build that was quicker has ended."""
    while saved_lines(folder) < count and child.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle(tmp_path: Path, tokenizer_path: Path, number: signal.Signals) -> None:
    """No worker lives on, nothing stands under the final names, and other settings clear away what is left."""
    child = start_build(tmp_path, tokenizer_path, "corpus.num_train_stories=100_000_000", "--workers", "2")
    wait_for_saves(child, tmp_path, 2)
    os.killpg(child.pid, number) if number == signal.SIGINT else child.kill()
    output, error = child.communicate(timeout=300)  # ends when the last process that holds the pipe does
    if number == signal.SIGINT:
        assert child.returncode == EXIT_INTERRUPTED
        assert output == "" and error.splitlines()[-1] == (
            "transformerlm-make-data: interrupted; the same command again goes on from here"
        ), error
        assert "Traceback" not in error
    assert entries(tmp_path) == [f".train.{kind}{UNFINISHED}" for kind in ("bin", "idx", "progress")]
    assert make_data.main(arguments(tmp_path, tokenizer_path, "output.val_prefix=")) == 0
    assert entries(tmp_path) == ["train.bin", "train.idx", "train.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grammar", "files"])
def test_killed_again_and_again_a_build_goes_on_and_gives_the_same_files(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path, kind: str
) -> None:
    stories = 4000
    corpus: CorpusSpec = GrammarCorpusSpec(num_train_stories=stories, num_val_stories=2)
    more = [f"corpus.num_train_stories={stories}", "--workers", "1"]
    if kind == "files":
        texts = [sample(1, index) if index % 7 else "" for index in range(stories // 2)]
        corpus = rows(tmp_path / "x.jsonl", *texts)
        more = ["corpus.kind=files", f'corpus.train_paths=["{tmp_path / "x.jsonl"}"]', "--workers", "1"]
    build_token_files(corpus, "train", tokenizer, tmp_path / "expected", workers=1)
    folder, rng = tmp_path / "out", random.Random(kind)
    folder.mkdir()
    kills, lines = 0, []
    while kills < 5:
        child = start_build(folder, tokenizer_path, *more)
        wait_for_saves(child, folder, saved_lines(folder) + rng.randrange(1, 8))
        time.sleep(rng.random() * 0.02)
        child.kill()
        child.communicate(timeout=300)
        if child.returncode != -signal.SIGKILL:
            break  # it was quicker
        kills += 1
        lines.append(saved_lines(folder))
    assert kills >= 2 and lines == sorted(set(lines))  # each went on behind the last one
    child = start_build(folder, tokenizer_path, *more)
    child.communicate(timeout=300)
    assert child.returncode == 0
    assert contents(folder / "train") == contents(tmp_path / "expected")
    assert entries(folder) == ["train.bin", "train.idx", "train.json"]


@pytest.fixture
def stopped_build(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> FilesCorpusSpec:
    """A build of four documents that stopped after three, which are saved."""
    monkeypatch.setattr(token_files, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(token_files, "CHUNK_CHARACTERS", 1)
    corpus = rows(tmp_path / "x.jsonl", "one", "", "three", "four")

    def stop(documents: int, tokens: int) -> None:
        if documents == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_token_files(corpus, "train", tokenizer, tmp_path / "a", workers=1, progress=stop)
    assert saved(tmp_path / "a") == [(1, 0), (1, 1), (2, 1)]
    return corpus


def saved(prefix: Path) -> list[tuple[int, int]]:
    """Documents and empty ones of each line of the journal."""
    lines = prefix.with_name(f".{prefix.name}.progress{UNFINISHED}").read_text().splitlines()
    return [(line["documents"], line["source"]["empty_documents_left_out"]) for line in map(json.loads, lines)]


def test_an_unfinished_build_is_told_of(
    tmp_path: Path, tokenizer_path: Path, stopped_build: FilesCorpusSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("corpus.kind=files", f"corpus.train_paths={json.dumps(stopped_build.train_paths)}")
    own = (*own, f"output.train_prefix={tmp_path / 'a'}")
    assert make_data.main(arguments(tmp_path, tokenizer_path, *own, "--verify")) == EXIT_FAILURE
    assert "a: a build is unfinished" in capsys.readouterr().err
    assert make_data.main(arguments(tmp_path, tokenizer_path, *own)) == 0
    assert "a: going on after 2 documents" in capsys.readouterr().err
    assert make_data.main(arguments(tmp_path, tokenizer_path, *own, "--verify")) == 0


def encoded_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which documents are encoded from here on."""
    seen: list[str] = []
    encode = token_files.encode_chunk

    def spy(chunk: token_files.Chunk, *rest: Any) -> token_files.Encoded:
        seen.extend(chunk)  # type: ignore[arg-type]
        return encode(chunk, *rest)

    monkeypatch.setattr(token_files, "encode_chunk", spy)
    return seen


def test_only_what_is_missing_is_encoded(
    tmp_path: Path, tokenizer: Tokenizer, stopped_build: FilesCorpusSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = encoded_texts(monkeypatch)
    build_token_files(stopped_build, "train", tokenizer, tmp_path / "a", workers=1)
    assert seen == ["four"]
    build_token_files(stopped_build, "train", tokenizer, tmp_path / "b", workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("damage", ["force", "bin", "idx", "journal", "text", "dtype", "tokenizer"])
def test_what_does_not_belong_is_not_taken_up(
    tmp_path: Path, tokenizer: Tokenizer, stopped_build: FilesCorpusSpec, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    texts, options = ["one", "", "three", "four"], {"force": damage == "force"}
    if damage in ("bin", "idx"):
        path = tmp_path / f".a.{damage}{UNFINISHED}"
        content = bytearray(path.read_bytes())
        content[-9 if damage == "bin" else 35] ^= 1
        path.write_bytes(content)
    if damage == "journal":
        (tmp_path / f".a.progress{UNFINISHED}").write_text('{"made_of": "')
    if damage == "text":
        texts[0] = "eno"
        rows(tmp_path / "x.jsonl", *texts)
    dtype = "int32" if damage == "dtype" else "auto"
    used = tokenizer.with_special_tokens(["<|more|>"]) if damage == "tokenizer" else tokenizer
    seen = encoded_texts(monkeypatch)
    build_token_files(stopped_build, "train", used, tmp_path / "a", workers=1, dtype=dtype, **options)
    assert seen == texts
    build_token_files(stopped_build, "train", used, tmp_path / "b", workers=1, dtype=dtype)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_torn_line_of_the_journal_is_forgotten(
    tmp_path: Path, tokenizer: Tokenizer, stopped_build: FilesCorpusSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / f".a.progress{UNFINISHED}"
    journal.write_bytes(journal.read_bytes()[:-5])
    seen = encoded_texts(monkeypatch)
    build_token_files(stopped_build, "train", tokenizer, tmp_path / "a", workers=1)
    assert seen == ["three", "four"]


def test_a_hub_text_that_has_changed_is_not_mixed(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is all that the fingerprint knows."""
    monkeypatch.setattr(token_files, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(token_files, "CHUNK_CHARACTERS", 1)
    serve(monkeypatch, {"train": BROKEN})
    corpus, prefix = HubCorpusSpec(dataset_name="x"), tmp_path / "a"
    with pytest.raises(UserError, match="not a string"):
        build_token_files(corpus, "train", tokenizer, prefix, workers=1)
    serve(monkeypatch, {"train": ["longer", "two"]})
    with pytest.raises(UserError, match=r"not what it was.*--force"):
        build_token_files(corpus, "train", tokenizer, prefix, workers=1)
    serve(monkeypatch, {"train": ["one", "two"]}, newest="second")  # it goes on with the commit that it began with
    made = build_token_files(corpus, "train", tokenizer, prefix, workers=1).manifest
    assert made.documents == 2 and made.source["commit"] == "first"
    serve(monkeypatch, {"train": ["one", "two", "three"]}, commit="second", newest="second")
    made = build_token_files(corpus, "train", tokenizer, prefix, workers=1, force=True).manifest
    assert made.documents == 3 and made.source["commit"] == "second"
