from __future__ import annotations

import pytest

from tests.tokenizer.oracles import SHARED
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import train_tokenizer

STORY = (
    """Once upon a time there was a naïve café in 東京の猫町. The cat said: "we've 123 ideas, don't we?" 😀😀

  Long ago, Ελληνικά letters and русский letters met there; they'd been friends since 1975, more or less.
"""
    * 3
)


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    if not (SHARED / "gpt2").is_dir():
        pytest.skip("needs GPT-2's vocab.json and merges.txt in ../shared/data/gpt2")
    return Tokenizer.load(SHARED / "gpt2")


@pytest.fixture(scope="session")
def stories() -> str:
    path = SHARED / "tinystories_train.txt"
    if not path.exists():
        pytest.skip("needs real text, ../shared/data/tinystories_train.txt")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A small trained tokenizer with the three special tokens, whose merges reach into multi-byte characters."""
    return train_tokenizer([STORY], TokenizerTrainingSpec(vocab_size=330))
