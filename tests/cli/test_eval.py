"""`transformerlm-eval`: the same numbers from every kind of data, and the truth beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli import eval as command
from tests.models.checkpoints import SPEC, model, tokenizer, write_checkpoint
from trainkit.data.megatron_writer import IndexedWriter
from transformerlm.corpus.stories import log_prob, sample, split_seed
from transformerlm.evaluation.likelihood import score_documents

STORIES = [sample(split_seed(0, "val"), index) for index in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint and validation files of three stories."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    write_checkpoint(path, 3, best=3)
    write_tokens(path / "val", corpus="grammar", made_with=tokenizer().content_hash)
    (path / "config.json").write_text(
        json.dumps({"data": {"pipeline_mode": "megatron", "megatron_val_prefix": str(path / "val")}})
    )
    return path


def write_tokens(prefix: Path, *, corpus: str, made_with: str, texts: list[str] = STORIES) -> None:
    with IndexedWriter(prefix, np.uint16, tokenizer=made_with, source={"corpus": {"kind": corpus}}) as writer:
        for text in texts:
            writer.add(np.append(tokenizer().encode(text), tokenizer().eot_id).astype(np.uint16))


def call(run: Path, *arguments: str) -> int:
    return command.main(["--ckpt", str(run), "--device", "cpu", *arguments])


def report(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert call(run, "--json", *arguments) == 0

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_the_numbers_are_those_of_the_documents(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = report(run, capsys)
    documents = [np.append(tokenizer().encode(text), tokenizer().eot_id) for text in STORIES]
    scores = score_documents(
        model(3), documents, tokenizer().byte_lengths(), eot_id=tokenizer().eot_id, context_length=SPEC.context_length
    )
    truth = -sum(log_prob(text) for text in STORIES)
    size = sum(len(text.encode()) for text in STORIES)
    assert result["documents"] == 3 and result["bytes"] == size
    assert result["loss"] == pytest.approx(scores.loss)
    assert result["perplexity"] == pytest.approx(math.exp(scores.loss))
    assert result["bits_per_byte"] == pytest.approx(scores.nats.sum() / math.log(2) / size)
    assert result["grammar"]["bits_per_byte"] == pytest.approx(truth / math.log(2) / size)
    assert result["grammar"]["excess"] == pytest.approx(scores.nats.sum() / truth - 1)
    assert result["grammar"]["excess_nats"] == pytest.approx((scores.nats.sum() - truth) / 3)


def test_every_kind_of_data_gives_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    expected = report(run, capsys)
    for arguments in (
        ["data.kind=tokens", f"data.prefix={run / 'val'}"],
        ["data.kind=files", f'data.paths=["{tmp_path / "val.jsonl"}"]'],
        ["data.kind=grammar", "data.num_stories=3"],
        ["evaluation.batch_size=1"],
        ["evaluation.max_documents=3"],
    ):
        result = report(run, capsys, *arguments)
        for name in ("loss", "bits_per_byte", "tokens", "bytes"):
            assert result[name] == pytest.approx(expected[name]), arguments
        assert ("grammar" in result) == ("data.kind=files" not in arguments)
    assert report(run, capsys, "evaluation.max_documents=1")["documents"] == 1


def test_what_one_document_cannot_tell_is_null(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grammar = report(run, capsys, "evaluation.max_documents=1")["grammar"]
    assert grammar["standard_error"] is None and grammar["excess_nats"] > 0
    assert call(run, "evaluation.max_documents=1") == 0
    assert "nan" not in capsys.readouterr().out
    write_tokens(tmp_path / "empty", corpus="files", made_with="", texts=[""])
    assert report(run, capsys, "data.kind=tokens", f"data.prefix={tmp_path / 'empty'}")["bits_per_byte"] is None


def test_the_table_is_for_people(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["checkpoint", "data", "method", "loss", "perplexity", "bits per byte", "grammar", "excess"]
    assert [line[:15].strip() for line in lines] == names
    assert "3 documents" in lines[1] and "% above it" in lines[-1].replace("±", "%")


def test_what_cannot_be_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens(tmp_path / "foreign", corpus="files", made_with="another")
    write_tokens(tmp_path / "altered", corpus="grammar", made_with="", texts=["This is no story."])
    (tmp_path / "empty").mkdir()
    lonely = write_checkpoint(tmp_path / "elsewhere", 1)
    for checkpoint, arguments, code, message in (
        (run, ["data.kind=tokens", f"data.prefix={tmp_path / 'foreign'}"], 1, "another tokenizer"),
        (run, ["data.kind=tokens", f"data.prefix={tmp_path / 'altered'}"], 1, "story 0 is not one of this version"),
        (run, ["data.kind=tokens", f"data.prefix={tmp_path / 'none'}"], 1, "does not exist"),
        (run, ["data.kind=files", f'data.paths=["{tmp_path / "empty"}"]'], 1, "empty"),
        (run, ["evaluation.stride=100"], 2, "evaluation.stride (100) exceeds"),
        (lonely, [], 1, "data.kind"),
        (tmp_path / "none", [], 1, "does not exist"),
    ):
        assert call(checkpoint, *arguments) == code
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1 and message in output.err, output.err
