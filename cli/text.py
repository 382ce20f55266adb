"""`transformerlm-train --text PATH`: settings for a run on a file or folder, and the tokenizer that it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli.stages import make_tokenizer, say
from cli.text_sources import held_out_texts, training_documents
from config.rendering import toml_value
from config.schemas import TrainConfig
from trainkit.data.specs import StreamDataSpec
from trainkit.data.splits import iterate
from trainkit.errors import UserError
from transformerlm.tokenizer.specs import TokenizerTrainingSpec

CONFIG = "train_text"
VOCAB_SIZE = 2048
_MADE_FROM_TEXT = "text "
"""Begins the fingerprint of the tokenizers that are made here, and may be made again when the text has changed."""


def text_settings(path: str, *, named_by_text: bool) -> list[str]:
    """What `--text` stands for, as settings; where no configuration was named, the run and its tokenizer are named
    after the text."""
    settings = ["data.pipeline_mode=packed", f"data.dataset_name={toml_value(path)}"]
    if named_by_text:
        name = run_name(path)
        settings += [f"run.name={name}", f"tokenizer.path=artifacts/{name}/tokenizer"]
    return settings


def run_name(path: str) -> str:
    """`My Texts/all.txt` as `all`: the part of a name before its first dot, as the name of a folder."""
    stem = Path(path).absolute().name.lstrip(".").split(".")[0]
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "text"


def prepare_tokenizer(config: TrainConfig, vocab_size: int) -> None:
    """Train the tokenizer of `config` on its training documents, unless one is there that can stay."""
    data, path = config.data, Path(config.tokenizer.path)
    assert isinstance(data, StreamDataSpec)
    if path.exists() and not _made_here(path):
        say("tokenizer", f"{path}, as it is")
        return
    documents = training_documents(data, revision="")
    spec = TokenizerTrainingSpec(vocab_size=vocab_size, allow_smaller=True)
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for text in iterate(documents):
            count += 1
            yield text

    make_tokenizer(path, spec, counted, _MADE_FROM_TEXT + documents.identity)
    if count and data.validation_fraction:
        held_out = len(held_out_texts(data, "val", revision="") or ())
        say("text", f"{held_out:,} documents held out to validate with, {count:,} to train on")


def describe(config: TrainConfig) -> str:
    """What is about to happen, in a line."""
    data = config.data
    assert isinstance(data, StreamDataSpec)
    held_out = f", {data.validation_fraction:.0%} of it held out for validation" if data.validation_fraction else ""
    return (
        f"{data.dataset_name}{held_out}; tokenizer {config.tokenizer.path}; "
        f"{config.training.max_steps:,} steps into {config.run.dir}/{config.run.name}"
    )


def _made_here(path: Path) -> bool:
    from trainkit.artifacts import read_manifest

    try:
        made_of: dict[str, Any] = read_manifest(path).get("made_of", {})
    except UserError:
        return False
    return str(made_of.get("fingerprint", "")).startswith(_MADE_FROM_TEXT)
