"""Cut text into pre-tokens: the pieces, about a word each, that merges never cross.

The pattern is GPT-2's (Radford et al. 2019). Python's `re` has no `\\p{L}`, so the classes are written out from pinned
Unicode tables. Bytes that are not UTF-8 travel through `str` as lone surrogates (PEP 383), so that nothing is lost; to
the pattern such a byte is neither a letter, a number nor white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from transformerlm.tokenizer.unicode_classes import LETTERS, NUMBERS, WHITE_SPACE, parse_ranges

CHUNK = 1 << 16
"""Characters that are split at a time: a list of all pre-tokens of a long text would take many times its size."""


def as_text(text: str | bytes) -> str:
    """`text` as a string that `to_bytes` turns back into its exact bytes.

    In a `str`, the surrogates that stand for raw bytes (U+DC80 to U+DCFF) become these bytes; others are no text in any
    encoding: a pair is joined to the character it means, a lone one is replaced by U+FFFD.
    """
    if isinstance(text, str):
        try:
            text.encode()
            return text
        except UnicodeEncodeError:
            text = _surrogates_to_bytes(text)
    return text.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """The bytes of what `as_text` returned, or of a part of it."""
    return text.encode("utf-8", "surrogateescape")


def pretokenize(text: str, start: int = 0, end: int | None = None) -> Iterator[list[str]]:
    """Yield the pre-tokens of `text[start:end]` in order, some thousands at a time; joined they are that text.

    Characters before `start` and from `end` on have no influence.
    """
    pattern, cut = _gpt2_pattern(), _cut_pattern()
    end = len(text) if end is None else end
    while start < end:
        found = cut.search(text, min(start + CHUNK, end), end)
        stop = found.end() if found else end
        yield pattern.findall(text, start, stop)
        start = stop


@cache
def _gpt2_pattern() -> re.Pattern[str]:
    letter, number, space = map(_class_body, (LETTERS, NUMBERS, WHITE_SPACE))
    return re.compile(
        r"'(?:[sdmt]|ll|ve|re)"  # an English contraction
        rf"| ?[{letter}]+"
        rf"| ?[{number}]+"
        rf"| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])"  # spaces, but the last one stays with the word that follows
        rf"|[{space}]+"
    )


@cache
def _cut_pattern() -> re.Pattern[str]:
    """Finds where a text may be cut in two without changing its pre-tokens: before a space that follows a non-space.

    White space stands only at the start of a pre-token or fills it, so one always starts there; and of all
    alternatives only a run of spaces looks ahead, so what ends before the cut does not depend on what follows.
    """
    space = _class_body(WHITE_SPACE)
    return re.compile(rf"[^{space}](?=[{space}])")


def _class_body(table: str) -> str:
    return "".join(rf"\U{first:08X}-\U{last:08X}" for first, last in parse_ranges(table))


def _surrogates_to_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
