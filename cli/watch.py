"""A diffusion model at work, in the terminal: text comes out of the noise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.text import Text

from transformerlm.inference.diffusion import Step
from transformerlm.inference.predictor import Predictor
from transformerlm.inference.specs import InferenceSpec

NOISE = "░"
"""What a mask looks like: about as wide as two letters, as a token is on average wider."""
STYLES = {"given": "dim", "noise": "bright_black", "new": "bold green", "text": ""}


def watch(predictor: Predictor, spec: InferenceSpec, console: Console | None = None) -> None:
    """Show each step of filling the canvas and leave the text on the screen; only that where there is no terminal."""
    console = console or Console()
    steps = predictor.denoise(
        [spec.prompt],
        suffix=spec.suffix,
        total_length=spec.total_length,
        sampling=spec,
        denoising=spec,
        seed=spec.seed,
        stop_at_eot=spec.stop_at_eot,
    )
    if not console.is_terminal:
        *_, last = steps
        new = predictor.new_text(last.canvas[0], spec.prompt, spec.suffix, stop_at_eot=spec.stop_at_eot)
        console.file.write(spec.prompt + new + spec.suffix + "\n")
        return
    drawn: set[int] = set()
    with Live(console=console, auto_refresh=False) as live:
        for step in steps:
            drawn |= set(step.positions)
            live.update(picture(predictor, step, drawn, stop_at_eot=spec.stop_at_eot), refresh=True)


def picture(predictor: Predictor, step: Step, drawn: set[int], *, stop_at_eot: bool = True) -> Text:
    """The canvas: given text dim, masks grey, what this step has written bright."""
    result = Text()
    for style, ids in _runs(predictor, step, drawn, stop_at_eot):
        result.append(NOISE * len(ids) if style == "noise" else predictor.tokenizer.decode(ids), STYLES[style])
    result.append(f"\n\nstep {step.number + 1}, {len(drawn)} tokens written", "bright_black")
    return result


def _runs(predictor: Predictor, step: Step, drawn: set[int], stop_at_eot: bool) -> Iterator[tuple[str, list[int]]]:
    """Neighbouring tokens of one style, up to the end of the text; the token that begins the document is no text."""
    new, mask_id, eot_id = set(step.positions), predictor.denoiser.mask_id, predictor.tokenizer.eot_id

    def style(place: int, token: int) -> str:
        if token == mask_id:
            return "noise"
        return "new" if place in new else "text" if place in drawn else "given"

    row = step.canvas[0].tolist()
    ends = [place for place in sorted(drawn) if row[place] == eot_id] if stop_at_eot else []
    end = ends[0] if ends else len(row)
    styled = [(style(place, token), token) for place, token in enumerate(row[:end]) if place > 0]
    for name, run in groupby(styled, key=lambda pair: pair[0]):
        yield name, [token for _, token in run]
