"""Checkpoints to load in tests: written as training writes them, without training."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from trainkit.artifacts import publish_directory
from transformerlm.models.build import create_model
from transformerlm.models.files import write_model_json
from transformerlm.models.specs import AUTOREGRESSIVE, Reading, TransformerSpec
from transformerlm.models.transformer import Transformer
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

SPEC = TransformerSpec(context_length=48, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2)


@cache
def tokenizer() -> Tokenizer:
    """280 ids: the model pads them to 384."""
    return train_tokenizer(
        ["the cat sat on the mat; the dog ate the hat; a bird sang. " * 9] * 2, TokenizerTrainingSpec(vocab_size=280)
    )


@cache
def model(seed: int = 0) -> Transformer:
    """A model with an opinion: sharper than a fresh one, so that ids differ from step to step."""
    result = create_model(SPEC, vocab_size=tokenizer().vocab_size, seed=seed)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return result.eval()


def write_checkpoint(
    run: Path,
    step: int,
    *,
    best: int = 0,
    ema: bool = False,
    vocab_size: int = 0,
    reading: Reading = AUTOREGRESSIVE,
) -> Path:
    """`run/checkpoints/step-…` of `model(step)`; its average, if any, is `model(step + 1000)`."""
    path = run / "checkpoints" / f"step-{step:08d}"
    with publish_directory(path) as directory:
        _write_weights(directory / "model.safetensors", model(step))
        if ema:
            _write_weights(directory / "ema.safetensors", model(step + 1000))
        write_model_json(directory, SPEC, vocab_size=vocab_size or tokenizer().vocab_size, reading=reading)
        tokenizer().save(directory / "tokenizer")
        trainer: dict[str, Any] = {"step": step, "best": {"step": best, "value": 1.0} if best else {}}
        (directory / "trainer.json").write_text(json.dumps(trainer))
    return path


def _write_weights(path: Path, source: Transformer) -> None:
    safetensors.torch.save_file({name: p.detach() for name, p in source.named_parameters()}, path)
