"""Plain references and texts that the tokenizer is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import tiktoken
from hypothesis import settings
from hypothesis import strategies as st

from transformerlm.tokenizer.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

fuzz = settings(deadline=None, max_examples=200)

# What the pattern tells apart, and what is easily mistaken: spaces that `str.isspace` and `\s` see differently, marks
# that combine, digits of several scripts, letters beyond 16 bits, unassigned code points and ends of ranges.
TRICKY = (
    *("'s", "'S", "'ll", "'ve", "'re", "''", " '", "don't", "<|", "|>", "<|endoftext|>", "<|pad|>"),
    *(" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000"),
    *(
        "\u200b",
        "\ufeff",
        "\u180e",
        "\x00",
        "\x7f",
        "a",
        "Z",
        "é",
        "e\u0301",
        "ß",
        "я",
        "中",
        "ק",
        "가",
        "𝔸",
        "𠀀",
        "ʰ",
    ),
    *("0", "9", "٣", "²", "½", "Ⅷ", "𝟙", "৴", "一", "-", "_", "€", "😀", "👩\u200d🚀", "\u0378", "\U000e0100"),
    *("\U0003ffff", "\U0010ffff", "\ud7ff", "\ue000", "\ufffd", "\uffff"),
)

any_text = st.one_of(
    st.text(),  # all of Unicode but surrogates
    st.lists(st.sampled_from(TRICKY)).map("".join),
    st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=3))).map("".join),
)
any_bytes = st.one_of(
    st.binary(),
    st.lists(st.one_of(st.binary(max_size=3), any_text.map(str.encode))).map(b"".join),
)


def tiktoken_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """tiktoken with the same ranks, built without our files."""
    return tiktoken.Encoding(
        name="reference",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=dict(tokenizer.vocabulary.tokens),
        special_tokens=tokenizer.special_tokens,
    )


def naive_merges(words: Mapping[bytes, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Count every pair anew before each merge."""
    sequences = [([bytes([value]) for value in word], count) for word, count in words.items()]
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for sequence, count in sequences:
            for pair in pairwise(sequence):
                counts[pair] += count
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        sequences = [(naive_merge(sequence, best), count) for sequence, count in sequences]
    return merges


def naive_merge(sequence: Sequence[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    result: list[bytes] = []
    for token in sequence:
        if result and (result[-1], token) == pair:
            result[-1] += token
        else:
            result.append(token)
    return result


def naive_encode(word: bytes, merges: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    """Apply each merge in turn to the whole word."""
    sequence = [bytes([value]) for value in word]
    for pair in merges:
        sequence = naive_merge(sequence, pair)
    return sequence
