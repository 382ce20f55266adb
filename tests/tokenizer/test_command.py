from __future__ import annotations

import json
from pathlib import Path

import pytest
import rich.console

from cli import train_tokenizer
from tests.tokenizer.conftest import STORY
from trainkit import artifacts
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer as train

DOCUMENTS = [STORY, "A second story.", "A third <|pad|> one, café."]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "stories.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return path


def run(corpus: Path, output: Path, *arguments: str) -> int:
    settings = ["corpus.kind=files", f"corpus.train_paths={json.dumps([str(corpus)])}", f"output.dir={output}"]
    return train_tokenizer.main([*settings, "tokenizer.vocab_size=330", *arguments])


def test_writes_the_tokenizer_and_says_what_and_what_next(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "tokenizer"
    assert run(corpus, output) == 0
    summary, following = capsys.readouterr().out.splitlines()
    assert summary.startswith(f"{output}: 330 ids (71 merges) from 3 documents")
    assert f"transformerlm-make-data tokenizer.path={output}" in following
    expected = train(DOCUMENTS, TokenizerTrainingSpec(vocab_size=330))
    assert Tokenizer.load(output).content_hash == expected.content_hash
    manifest = artifacts.read_manifest(output)
    assert manifest["training"]["vocab_size"] == 330
    assert manifest["corpus"]["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)


def test_text_files_and_rows_give_the_same_tokenizer(corpus: Path, tmp_path: Path) -> None:
    text = corpus.with_name("stories.txt")
    text.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    assert run(corpus, tmp_path / "a") == run(text, tmp_path / "b") == 0
    rows, texts = artifacts.read_manifest(tmp_path / "a"), artifacts.read_manifest(tmp_path / "b")
    assert rows["content_hash"] == texts["content_hash"]
    assert rows["corpus"] == texts["corpus"]


def test_an_existing_tokenizer_stays_unless_forced(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokenizer"
    assert run(corpus, output) == 0
    assert run(corpus, output, "--vocab-size", "300") == 1
    assert "exists already" in capsys.readouterr().err
    assert Tokenizer.load(output).vocab_size == 330
    assert run(corpus, output, "--vocab-size", "300", "--force") == 0
    assert Tokenizer.load(output).vocab_size == 300


def test_an_interruption_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    for stop_at in ("write", "seal", "rename"):

        def hook(stage: str, stop_at: str = stop_at) -> None:
            if stage == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(artifacts, "step_hook", hook)
        assert run(corpus, tmp_path / "tokenizer") == 130
        assert sorted(tmp_path.rglob("*")) == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        ("", [], 1, "holds no document"),
        ('{"text": ""}\n', [], 1, "the corpus for the tokenizer is empty"),
        ('{"text": "abc"}\n', [], 1, "yields only 2 of 71 merges"),
        ('{"story": "abc"}\n', [], 1, "text_field"),
        (
            None,
            ["tokenizer.vocab_size=258"],
            2,
            "tokenizer.vocab_size = 258 is too small: 256 bytes and 3 special",
        ),
        (None, ["tokenizer.vocab_size=5"], 2, "tokenizer.vocab_size = 5 is too small"),
        (None, ["tokenizer.vocab_size=-1", "output.dir=/proc/nowhere/tokenizer"], 2, "tokenizer.vocab_size = -1"),
        (None, ['tokenizer.special_tokens=["<s>", "<s>"]'], 2, "tokenizer.special_tokens: "),
        (None, ["output.dir=/proc/nowhere/tokenizer"], 1, "cannot create"),
        (None, ['corpus.train_paths=["missing.txt"]'], 1, "missing.txt does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    if content is not None:
        corpus.write_text(content)
    before = sorted(tmp_path.rglob("*"))
    assert run(corpus, tmp_path / "tokenizer", *arguments) == code
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_smaller_vocabulary_is_written_when_it_is_allowed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.write_text('{"text": "abc"}\n')
    assert run(corpus, tmp_path / "tokenizer", "tokenizer.allow_smaller=true") == 0
    summary, smaller, _ = capsys.readouterr().out.splitlines()
    assert "261 ids (2 merges)" in summary
    assert "no more than 2 merges" in smaller
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size == 261


def test_long_work_shows_progress_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_tokenizer, "QUIET_SECONDS", 0.0)
    for is_terminal in (False, True):
        monkeypatch.setattr(rich.console.Console, "is_terminal", is_terminal)
        train_tokenizer.train_on_documents(DOCUMENTS, TokenizerTrainingSpec(vocab_size=330))
        assert ("documents read" in capsys.readouterr().err) == is_terminal
