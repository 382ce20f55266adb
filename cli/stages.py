"""What the pipeline and `transformerlm-train --text` make before they train, and reuse while it matches its inputs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from trainkit.artifacts import require_replaceable
    from transformerlm.tokenizer.tokenizer import Tokenizer

    settings = {name: getattr(spec, name) for name in TokenizerTrainingSpec.__dataclass_fields__}
    made_of: dict[str, Any] = {
        "recipe": TOKENIZER_RECIPE,
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "fingerprint": fingerprint,
    }
    if not force and _is_made_of(path, made_of, verify=verify):
        say("tokenizer", f"{path}, up to date")
        return Tokenizer.load(path)
    require_replaceable(path, kind="tokenizer")
    start = time.monotonic()
    tokenizer, about = train_on_documents(documents(), TokenizerTrainingSpec(**settings))
    tokenizer.save(path, replace=True, about={**about, "made_of": made_of})
    say("tokenizer", f"{path}: {tokenizer.vocab_size:,} ids in {time.monotonic() - start:.1f} s")
    return tokenizer


def _is_made_of(path: Path, made_of: dict[str, Any], *, verify: bool) -> bool:
    """Whether a whole directory is there that was made of the same things; a damaged one is an error under `verify`."""
    from trainkit.artifacts import read_manifest, verify_directory
    from trainkit.errors import UserError

    try:
        manifest = read_manifest(path)
    except UserError:
        return False
    if verify:
        verify_directory(path)
    return manifest.get("made_of") == made_of


def say(stage: str, text: str) -> None:
    """Stages speak on the standard error, so that the standard output stays JSON lines where it is no terminal."""
    print(f"[{stage}] {text}", file=sys.stderr, flush=True)
