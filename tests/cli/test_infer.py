"""`transformerlm-infer` on a checkpoint: what it prints, and what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli import infer
from config.loading import load, shipped
from config.schemas import InferConfig
from tests.models.checkpoints import write_checkpoint
from trainkit.errors import EXIT_USAGE
from transformerlm.inference.predictor import Predictor

LIMITS = ["inference.total_length=30", "inference.stop_at_eot=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    write_checkpoint(path, 3)
    return path


def call(run: Path, *arguments: str) -> int:
    return infer.main(["--ckpt", str(run), "--device", "cpu", *LIMITS, *arguments])


def test_it_prints_the_prompt_and_its_continuation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "--prompt", "the cat", "--seed", "5") == 0
    predictor = Predictor.from_checkpoint(run, device="cpu")
    sampling = load(InferConfig, shipped("infer")).config.inference
    expected = predictor.generate("the cat", total_length=30, sampling=sampling, seed=5, stop_at_eot=False)
    assert capsys.readouterr().out == f"the cat{expected}\n"


def test_the_shipped_settings_suit_any_context(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main(["--ckpt", str(run), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_samples_are_told_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "--prompt", "the cat", "inference.num_samples=3") == 0
    samples = capsys.readouterr().out.removesuffix("\n").split(f"\n{infer.SEPARATOR}\n")
    assert len(set(samples)) == 3 and all(sample.startswith("the cat") for sample in samples)
    assert call(run, "--prompt", "the cat", "inference.num_samples=3", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] + row["text"] for row in rows] == samples


def test_a_prompt_is_taken_literally(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "--prompt", '5 "=') == 0
    assert capsys.readouterr().out.startswith('5 "=')


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inference.total_length=500"], 2, "exceeds the model's context of 48 tokens"),
        (["--prompt", "q" * 60], 2, "60 tokens of prompt fill the model's context"),
        (["inference.total_length=3", "--prompt", "qqqq"], 2, "must be larger than the 4 tokens of prompt"),
        (["inference.weights=ema"], 1, "kept no average"),
        (["--watch"], 2, "this checkpoint was trained for next tokens"),
        (["--device", "cuda:99"], 2, "no device"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert call(run, *arguments) == code
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and message in output.err


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path / "none") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"transformerlm-infer: {tmp_path / 'none'} does not exist; ") and error.count("\n") == 1


def test_settings_that_do_nothing_are_noted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "inference.threshold=0.9", "inference.order=margin") == 0
    output = capsys.readouterr()
    assert output.out and "inference.order, inference.threshold: for diffusion only" in output.err
    assert call(run) == 0 and capsys.readouterr().err == ""


# -- conversation ------------------------------------------------------------------------------------------------------


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """A terminal at which someone types `lines`."""
    typed: Iterator[Any] = iter(lines)

    def read(prompt: str) -> str:
        print(prompt, end="")
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_conversation_goes_on_until_the_end_is_typed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: type[BaseException]
) -> None:
    type_lines(monkeypatch, "the cat", "q" * 60, "the cat", end)
    assert call(run, "--interactive") == 0
    output = capsys.readouterr()
    first, refused, second, _ = output.out.removeprefix("> ").split("> ")
    assert first.startswith("the cat") and second.startswith("the cat") and first != second
    assert (
        refused == "" and "60 tokens of prompt fill the model's context" in output.err and "Traceback" not in output.err
    )


def test_a_conversation_in_a_mode_that_the_model_does_not_know_never_begins(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch)
    assert call(run, "--interactive", "inference.mode=diffusion") == EXIT_USAGE
    assert capsys.readouterr().err.count("trained for ar") == 1


def test_an_interrupt_stops_the_continuation_only(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original: Callable[..., Iterator[str]] = Predictor.stream

    def interrupted(self: Predictor, prompt: str, **options: Any) -> Iterator[str]:
        pieces = original(self, prompt, **options)
        yield next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "stream", interrupted)
    type_lines(monkeypatch, "the cat", "a bird", EOFError)
    assert call(run, "--interactive") == 0
    assert "> a bird" in capsys.readouterr().out


def test_lines_from_a_pipe_are_continued_without_decoration(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    assert call(run, "--interactive") == 0
    output = capsys.readouterr()
    assert output.out.startswith("the cat") and output.err == ""
