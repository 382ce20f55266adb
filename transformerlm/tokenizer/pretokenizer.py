"""Cut text into pre-tokens: the pieces, about a word each, that merges never cross.

The patterns are GPT-2's (Radford et al. 2019) and those of its successors. Python's `re` has no `\\p{L}`: the classes
are written out from pinned Unicode tables. Bytes that are not UTF-8 travel through `str` as lone surrogates (PEP 383),
so that nothing is lost; to the pattern such a byte is neither a letter, a number nor white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from transformerlm.tokenizer.specs import PatternName
from transformerlm.tokenizer.unicode_classes import (
    LETTERS,
    LOWERCASE,
    MARKS,
    NUMBERS,
    UPPERCASE,
    WHITE_SPACE,
    parse_ranges,
)

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


def ends_in_white(text: str) -> bool:
    return text[-1:] in _white_characters()


def to_bytes(text: str) -> bytes:
    """The bytes of what `as_text` returned, or of a part of it."""
    return text.encode("utf-8", "surrogateescape")


def pretokenize(
    text: str, start: int = 0, end: int | None = None, pattern: PatternName = "gpt2"
) -> Iterator[list[str]]:
    """Yield the pre-tokens of `text[start:end]` in order, some thousands at a time; joined they are that text.

    Characters before `start` and from `end` on have no influence.
    """
    expression = _ascii_expression(pattern) if text.isascii() else _expression(pattern)
    cut = _cut_pattern()
    end = len(text) if end is None else end
    while start < end:
        found = cut.search(text, min(start + CHUNK, end), end)
        stop = found.end() if found else end
        yield expression.findall(text, start, stop)
        start = stop


PATTERNS: dict[PatternName, str] = {
    "gpt2": (
        r"'(?:[sdmt]|ll|ve|re)"  # an English contraction
        r"| ?\p{L}+"
        r"| ?\p{N}+"
        r"| ?[^\s\p{L}\p{N}]+"
        r"|\s+(?!\S)"  # spaces, but the last one stays with the word that follows
        r"|\s+"
    ),
    "cl100k": (
        r"'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+\z"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?:'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE]))?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?:'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE]))?"
        r"|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    ),
}
"""As other engines of regular expressions take them. They split as tiktoken 0.14's patterns of these names do."""


@cache
def _expression(pattern: PatternName) -> re.Pattern[str]:
    r"""The pattern with its classes written out, for an engine that has no `\p{…}` and another idea of `\s`."""
    classes = {
        r"\p{Lm}\p{Lo}": _body(_codes(LETTERS) - _codes(UPPERCASE) - _codes(LOWERCASE)),
        r"\p{Lu}\p{Lt}": _class_body(UPPERCASE),
        r"\p{Ll}": _class_body(LOWERCASE),
        r"\p{L}": _class_body(LETTERS),
        r"\p{N}": _class_body(NUMBERS),
        r"\p{M}": _class_body(MARKS),
        r"\s": _class_body(WHITE_SPACE),
    }
    return _compile(pattern, classes)


@cache
def _ascii_expression(pattern: PatternName) -> re.Pattern[str]:
    """The same for text of ASCII alone, for which it is much faster."""
    letters = {r"\p{Lm}\p{Lo}": "", r"\p{Lu}\p{Lt}": "A-Z", r"\p{Ll}": "a-z", r"\p{L}": "A-Za-z"}
    return _compile(pattern, {**letters, r"\p{N}": "0-9", r"\p{M}": "", r"\s": r"\t-\r "})


def _compile(pattern: PatternName, classes: dict[str, str]) -> re.Pattern[str]:
    expression = PATTERNS[pattern].replace(r"\S", r"[^\s]").replace(r"\z", r"\Z")
    for name, body in classes.items():
        expression = re.sub(rf"(\[[^\]]*){re.escape(name)}", lambda found, body=body: found[1] + body, expression)
        expression = expression.replace(name, f"[{body}]")
    return re.compile(expression)


@cache
def _white_characters() -> frozenset[str]:
    return frozenset(map(chr, _codes(WHITE_SPACE)))


@cache
def _cut_pattern() -> re.Pattern[str]:
    """Finds where a text may be cut in two without changing its pre-tokens: before a space that follows a non-space.

    In all patterns a space stands only at the start of a pre-token or among white space, so one always starts there;
    and of all alternatives only a run of white space looks ahead, so what ends before the cut does not depend on what
    follows.
    """
    space = _class_body(WHITE_SPACE)
    return re.compile(rf"[^{space}](?= )")


def _codes(table: str) -> set[int]:
    return {code for first, last in parse_ranges(table) for code in range(first, last + 1)}


def _body(codes: set[int]) -> str:
    starts = sorted(code for code in codes if code - 1 not in codes)
    ends = sorted(code for code in codes if code + 1 not in codes)
    return "".join(rf"\U{first:08X}-\U{last:08X}" for first, last in zip(starts, ends, strict=True))


def _class_body(table: str) -> str:
    return "".join(rf"\U{first:08X}-\U{last:08X}" for first, last in parse_ranges(table))


def _surrogates_to_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
