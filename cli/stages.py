"""What the pipeline and `transformerlm-train --text` make before they train, and reuse while it matches its inputs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.tokenizer.specs import TokenizerTrainingSpec

if TYPE_CHECKING:
    from transformerlm.tokenizer.tokenizer import Tokenizer

TOKENIZER_RECIPE = 1
"""Raise it when the same text and settings would give another tokenizer, so that old ones are trained again."""


def make_tokenizer(
    path: Path,
    spec: TokenizerTrainingSpec,
    documents: Callable[[], Iterator[str]],
    fingerprint: str,
    *,
    force: bool = False,
    verify: bool = False,
) -> Tokenizer:
    """Train a tokenizer on `documents()` into `path`, unless one of the same settings and `fingerprint` is there."""
    from cli.train_tokenizer import train_on_documents
    from trainkit.artifacts import require_replaceable, verify_directory
    from transformerlm.tokenizer.tokenizer import Tokenizer

    made_of: dict[str, Any] = {
        "recipe": TOKENIZER_RECIPE,
        "settings": _settings(spec),
        "fingerprint": fingerprint,
    }
    earlier = _made_of(path)
    if not force and earlier == made_of:
        if verify:
            verify_directory(path)
        say("tokenizer", f"{path}, up to date")
        return Tokenizer.load(path)
    require_replaceable(path, kind="tokenizer")
    if earlier is not None and not force:
        what = changes("tokenizer", earlier.get("settings", {}), made_of["settings"]) or "of other text"
        say("tokenizer", f"replacing {path} ({what}); runs trained with it go on only when it is made again as it was")
    start = time.monotonic()
    tokenizer, about = train_on_documents(documents(), _training_spec(spec))
    tokenizer.save(path, replace=True, about={**about, "made_of": made_of})
    say("tokenizer", f"{path}: {tokenizer.vocab_size:,} ids in {time.monotonic() - start:.1f} s")
    return tokenizer


def require_same_settings(path: Path, spec: TokenizerTrainingSpec) -> None:
    """Refuse a shared tokenizer that was trained here with other settings; one from elsewhere has none."""
    earlier = _made_of(path)
    if earlier and (what := changes("tokenizer", earlier.get("settings", {}), _settings(spec))):
        raise UserError(
            f"{path} was trained with other settings ({what}): take these, choose another --experiment, or train it "
            "again with --force-retrain-tokenizer",
            EXIT_USAGE,
        )


def changes(table: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`corpus.seed was 0, is 1`: the settings of `table` that both have and that differ; values as JSON has them."""
    texts = [{name: json.dumps(value) for name, value in settings.items()} for settings in (before, now)]
    return "; ".join(
        f"{table}.{name} was {texts[0][name]}, is {text}"
        for name, text in texts[1].items()
        if texts[0].get(name, text) != text
    )


def _training_spec(spec: TokenizerTrainingSpec) -> TokenizerTrainingSpec:
    """The training alone, where `spec` is the table of a command that has more settings."""
    return TokenizerTrainingSpec(**{name: getattr(spec, name) for name in TokenizerTrainingSpec.__dataclass_fields__})


def _settings(spec: TokenizerTrainingSpec) -> dict[str, Any]:
    """As JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(_training_spec(spec))))


def _made_of(path: Path) -> dict[str, Any] | None:
    """What the directory says that it was made of; None where there is none, or its manifest cannot be read."""
    from trainkit.artifacts import read_manifest

    try:
        return dict(read_manifest(path).get("made_of", {}))
    except UserError:
        return None


def say(stage: str, text: str) -> None:
    """Stages speak on the standard error, so that the standard output stays JSON lines where it is no terminal."""
    print(f"[{stage}] {text}", file=sys.stderr, flush=True)
