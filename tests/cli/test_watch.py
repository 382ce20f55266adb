"""The picture of a canvas that is being filled."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.control import strip_control_codes

from cli import infer
from cli.watch import NOISE, picture, watch
from tests.models.checkpoints import model, tokenizer, write_checkpoint
from transformerlm.inference.diffusion import Step
from transformerlm.inference.predictor import Predictor
from transformerlm.inference.specs import InferenceSpec
from transformerlm.models.specs import Reading

PREDICTOR = Predictor(model(), tokenizer(), Reading(modes=("diffusion",), alignment="in_place"))


def test_given_text_noise_and_new_text_look_different() -> None:
    drawn: set[int] = set()
    for step in PREDICTOR.denoise(["the cat"], suffix=" mat", total_length=20, seed=1):
        step = Step(**{**vars(step), "canvas": step.canvas.clone()})
        drawn |= set(step.positions)
        shown = picture(PREDICTOR, step, drawn)
        by_style: dict[str, str] = {}
        for span in shown.spans:
            by_style[str(span.style)] = by_style.get(str(span.style), "") + shown.plain[span.start : span.end]
        assert shown.plain.startswith("the cat")
        assert by_style["dim"] in ("the cat", "the cat mat")
        new = [step.tokens[i] for i in sorted(range(len(step.tokens)), key=lambda i: step.positions[i])]
        assert by_style.get("bold green", "") == strip_control_codes(tokenizer().decode(new))
        masks = int((step.canvas == tokenizer().mask_id).sum())
        assert shown.plain.count(NOISE) == masks
    assert masks == 0


def test_where_there_is_no_terminal_only_the_text_is_left() -> None:
    out = io.StringIO()
    spec = InferenceSpec(prompt="the cat", suffix=" mat", total_length=20, seed=1)
    watch(PREDICTOR, spec, Console(file=out, force_terminal=False, width=500))
    text = PREDICTOR.generate("the cat", suffix=" mat", total_length=20, seed=1)
    assert out.getvalue() == f"the cat{text} mat\n"
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("setting", ["inference.mode=ar", "inference.num_samples=2"])
def test_what_is_no_one_text_out_of_noise_is_not_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    write_checkpoint(tmp_path, 1, reading=Reading(modes=("ar", "diffusion")))
    assert infer.main(["--ckpt", str(tmp_path), "--device=cpu", "--watch", setting]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "--watch shows one text" in output.err and output.err.count("\n") == 1


def test_a_terminal_sees_the_masks_go(tmp_path: Path) -> None:
    out = io.StringIO()
    watch(PREDICTOR, replace(InferenceSpec(), prompt="the", total_length=12), Console(file=out, force_terminal=True))
    assert NOISE in out.getvalue()
