"""`transformerlm-infer`: text from a checkpoint, once or in a conversation."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from cli.common import Command, run_command
from config.loading import Loaded
from config.schemas import InferConfig
from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.inference.specs import DenoisingSpec, InferenceSpec

if TYPE_CHECKING:
    from transformerlm.inference.predictor import Predictor

SEPARATOR = "---"
"""The line between two samples."""


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[InferConfig], arguments: argparse.Namespace) -> None:
    from cli.watch import watch
    from transformerlm.inference.predictor import Predictor

    spec = loaded.config.inference
    if arguments.prompt is not None:
        spec = replace(spec, prompt=arguments.prompt)
    if arguments.suffix is not None:
        spec = replace(spec, suffix=arguments.suffix)
    predictor = Predictor.from_checkpoint(
        spec.checkpoint, device=spec.device, weights=spec.weights, precision=spec.precision
    )
    mode = predictor.resolve_mode(spec.mode)  # a wrong one is refused once, not at every line of a conversation
    if mode == "ar" and not arguments.watch:
        _note_what_does_nothing(predictor, spec)
    if arguments.watch:
        _check_watchable(predictor, spec, arguments)
        watch(predictor, spec)
    elif arguments.interactive:
        converse(predictor, spec)
    elif arguments.json:
        for text in complete(predictor, spec):
            print(json.dumps({"prompt": spec.prompt, "text": text}, ensure_ascii=False), flush=True)
    elif spec.num_samples == 1:
        stream(predictor, spec)
    else:
        print(f"\n{SEPARATOR}\n".join(spec.prompt + text + spec.suffix for text in complete(predictor, spec)))


def _note_what_does_nothing(predictor: Predictor, spec: InferenceSpec) -> None:
    idle = [field.name for field in fields(DenoisingSpec) if getattr(spec, field.name) != field.default]
    if idle:
        names = ", ".join(f"inference.{name}" for name in idle)
        advice = "; set inference.mode=diffusion for it" if "diffusion" in predictor.reading.modes else ""
        print(f"{names}: for diffusion only, and this text is written as next tokens{advice}", file=sys.stderr)


def _check_watchable(predictor: Predictor, spec: InferenceSpec, arguments: argparse.Namespace) -> None:
    if arguments.interactive or arguments.json:
        raise UserError("--watch goes with neither --interactive nor --json; choose one", EXIT_USAGE)
    if "diffusion" not in predictor.reading.modes:
        raise UserError(
            "--watch shows a diffusion model at work; this checkpoint was trained for next tokens: leave it out",
            EXIT_USAGE,
        )
    if spec.mode == "ar" or spec.num_samples > 1:
        what = 'inference.mode = "ar"' if spec.mode == "ar" else f"inference.num_samples = {spec.num_samples}"
        raise UserError(f"--watch shows one text come out of the noise, which {what} is not; leave one out", EXIT_USAGE)


def complete(predictor: Predictor, spec: InferenceSpec) -> list[str]:
    """The continuations that the settings ask for."""
    return predictor.generate_batch(
        [spec.prompt] * spec.num_samples,
        suffix=spec.suffix,
        total_length=spec.total_length,
        mode=spec.mode,
        sampling=spec,
        denoising=spec,
        seed=spec.seed,
        stop_at_eot=spec.stop_at_eot,
    )


def stream(predictor: Predictor, spec: InferenceSpec) -> None:
    """Print the prompt and its continuation, as it arises where that is from left to right."""
    if predictor.resolve_mode(spec.mode) == "diffusion" or spec.suffix:
        [text] = complete(predictor, replace(spec, num_samples=1))
        print(spec.prompt + text + spec.suffix, flush=True)
        return
    pieces = predictor.stream(
        spec.prompt, total_length=spec.total_length, sampling=spec, seed=spec.seed, stop_at_eot=spec.stop_at_eot
    )
    print(spec.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def converse(predictor: Predictor, spec: InferenceSpec) -> None:
    """Continue line after line. Ctrl-C ends a continuation, or at the prompt, like Ctrl-D, the conversation."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # gives `input` its line editing, where Python was built with it
            importlib.import_module("readline")
        print("Type the beginning of a text. Ctrl-C stops a continuation, Ctrl-D ends.", file=sys.stderr)
    for turn in range(sys.maxsize):
        try:
            prompt = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            if is_terminal:
                print()
            return
        try:
            stream(predictor, replace(spec, prompt=prompt, seed=spec.seed + turn))
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue, whatever characters it has")
    parser.add_argument("--interactive", action="store_true", help="continue what you type, line after line")
    parser.add_argument("--suffix", metavar="TEXT", help="text that follows what a diffusion model writes")
    parser.add_argument("--watch", action="store_true", help="see a diffusion model's text come out of the noise")
    parser.add_argument("--json", action="store_true", help="print one JSON object per sample")


COMMAND = Command(
    name="transformerlm-infer",
    summary="Continue a text with a trained model, or with a diffusion model fill it in.",
    schema=InferConfig,
    default_config="infer",
    run=run,
    examples=(
        '--ckpt runs/quickstart --prompt "One day, Tom"',
        "--config config/resources/infer.toml inference.num_samples=3 inference.temperature=0.7",
        "--ckpt runs/quickstart --interactive",
        "--ckpt runs/quickstart_diffusion --watch",
        '--ckpt runs/quickstart_diffusion --prompt "Once upon a time" --suffix " The end." inference.total_length=60',
    ),
    useful=(
        "inference.checkpoint",
        "inference.prompt",
        "inference.total_length",
        "inference.num_samples",
        "inference.temperature",
        "inference.mode",
        "inference.order",
        "inference.steps",
        "inference.top_p",
        "inference.seed",
    ),
    flags={
        "--ckpt": "inference.checkpoint",
        "--checkpoint": "inference.checkpoint",
        "--device": "inference.device",
        "--seed": "inference.seed",
    },
    add_arguments=_add_arguments,
)


if __name__ == "__main__":
    raise SystemExit(main())
