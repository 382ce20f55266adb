"""Settings of tokenizer training, as a frozen dataclass that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
MASK = "<|mask|>"

PatternName = Literal["gpt2", "cl100k", "o200k"]


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingSpec:
    """What a byte-level BPE vocabulary is made of."""

    vocab_size: int = 8192
    """Number of ids in all: 256 bytes, the merges, and the special tokens. At least 256 + the special tokens."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT, PAD, MASK)
    """Atomic tokens, never merged with text; they take the last ids in this order."""
    pattern: PatternName = "gpt2"
    """How text is split before merging (no token crosses a split): as GPT-2, cl100k (GPT-4) or o200k (GPT-4o) does."""
    max_words: Annotated[int, Ge(0)] = 0
    """Distinct words to keep while counting, the most frequent ones; bounds memory on huge corpora. 0 = all of them."""
    allow_smaller: bool = False
    """Accept a corpus that cannot yield enough merges, and write the smaller vocabulary that it reaches."""
