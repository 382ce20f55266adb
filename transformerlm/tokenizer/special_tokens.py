"""Find special tokens in text: the leftmost first, and of those that start at the same place the longest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from trainkit.errors import UserError


@dataclass(frozen=True, eq=False)
class SpecialTokens:
    """Which special tokens to look for in a text; others are encoded as the plain characters they are written with."""

    ids: Mapping[str, int]
    forbidden: frozenset[str]
    """Those of them that must not occur."""

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.ids)

    def check_allowed(self, name: str) -> None:
        if name in self.forbidden:
            raise UserError(
                f"the text holds the special token {name!r}, which is not allowed in it; remove it, or encode with "
                f"it in allowed_special, or leave it out of disallowed_special to encode it as plain text"
            )


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
