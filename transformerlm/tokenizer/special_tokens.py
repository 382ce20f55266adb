"""Find special tokens in text: the leftmost first, and of those that start at the same place the longest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache


def split_special(text: str, names: frozenset[str]) -> Iterator[tuple[int, int, str]]:
    """Yield `(start, end, name)`: ordinary text in `text[start:end]`, and the special token after it ("" = the end)."""
    start = 0
    for match in _pattern(names).finditer(text) if names else ():
        yield start, match.start(), match.group()
        start = match.end()
    yield start, len(text), ""


@lru_cache
def _pattern(names: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
